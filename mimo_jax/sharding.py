"""Where every array lives on a mesh: one table from parameter names to logical axes, one from those to mesh axes.

Parameters and caches are placed by their names and shapes, and the compiler follows. Where it would move more than it
must, modules call `rows_of` and `gathered`, or take the mesh in hand (`experts.routed_ffn`, `fp8_linear`); without a
mesh all that is nothing (docs/LOG.md says what each of them avoids).

A mesh has three axes. "data" splits the batch. The devices of one replica are "expert" x "tensor": routed experts are
dealt out over the first and cut over the second, everything else is cut over both. Tensor parallel over 8 is 1 x 8.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mimo_jax.cache import LayerCache
from mimo_jax.checkpoint.names import weights
from mimo_jax.checkpoint.tensorfile import DTYPES
from mimo_jax.config import GLOBAL, SLIDING, ModelConfig
from mimo_jax.errors import UserError

DATA, EXPERT, TENSOR = "data", "expert", "tensor"
REPLICA = (EXPERT, TENSOR)  # all devices that hold one copy of the model

# Logical axis -> mesh axes.
MESH_AXES: dict[str | None, Any] = {
    "batch": DATA,
    "vocab": REPLICA,
    "heads": REPLICA,  # query heads with their key/value heads; the chunks of a fused QKV
    "features": REPLICA,  # of a dense MLP, and of what a projection without heads reads
    "router": REPLICA,  # the experts as the router's rows
    "experts": EXPERT,
    "expert_features": TENSOR,
    None: None,
}

# Last name of a parameter's path -> logical axes, from the first; what is not here is replicated.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embed": ("vocab", None),
    "head": ("vocab", None),
    "qkv": ("heads", None, None),
    **dict.fromkeys("qkv", ("heads", None)),
    "o": (None, "heads"),
    "sink": ("heads",),
    "gate": ("features", None),
    "up": ("features", None),
    "down": (None, "features"),
    "eh_proj": (None, "features"),
    "fuse": (None, "features"),
    "bias_out": ("vocab", None),
    "router": ("router", None),
}
EXPERTS: dict[str, tuple[str | None, ...]] = {
    "gate": ("experts", "expert_features", None),
    "up": ("experts", "expert_features", None),
    "down": ("experts", None, "expert_features"),
}
# The same in the tiles of `pallas_kernels.expert_matmul`, whose axes are [experts, granules, slots, words].
TILED_EXPERTS: dict[str, tuple[str | None, ...]] = {
    "gate_up": ("experts", None, "expert_features", None),
    "down": ("experts", "expert_features", None, None),
}
PACKED_FIELDS = ("codes", "scales")
AnyMesh = Mesh | AbstractMesh
CACHE = ("batch", "heads", None, None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices along each mesh axis: `Layout(tensor=8)` for tensor parallel over 8, `Layout(expert=8)` for experts."""

    data: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if type(size) is not int or size < 1:
                raise UserError(f"mesh: {name}={size!r} must be a positive integer")

    @property
    def replica(self) -> int:
        """Devices that hold one copy of the model."""
        return self.expert * self.tensor

    @property
    def devices(self) -> int:
        return self.data * self.replica

    def check_divides(self, config: ModelConfig) -> None:
        """Raises, naming the numbers, unless the mesh divides the heads, experts and features of `config`."""
        for field, count, ways in (
            ("num_heads", config.num_heads, self.replica),
            ("num_kv_heads", config.kv_heads(GLOBAL), self.replica),
            ("sliding_num_kv_heads", config.kv_heads(SLIDING), self.replica),
            ("num_experts", config.num_experts if any(config.moe_pattern) else self.replica, self.replica),
            ("moe_intermediate_size", config.moe_intermediate_size, self.tensor),
            ("intermediate_size", config.intermediate_size, self.replica),
            ("vocab_size", config.vocab_size, self.replica),
        ):
            if count % ways:
                raise UserError(
                    f"mesh: {field}={count} cannot be split over {ways} devices "
                    f"(data={self.data}, expert={self.expert}, tensor={self.tensor})"
                )


def make_mesh(layout: Layout, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a layout over `devices` (default: all that JAX has), neighbours along the last axis."""
    devices = jax.devices() if devices is None else devices
    if len(devices) < layout.devices:
        raise UserError(
            f"mesh: data={layout.data} x expert={layout.expert} x tensor={layout.tensor} needs {layout.devices} "
            f"devices; {len(devices)} found"
        )
    grid = np.array(devices[: layout.devices]).reshape(layout.data, layout.expert, layout.tensor)
    return Mesh(grid, (DATA, EXPERT, TENSOR), axis_types=(AxisType.Auto,) * 3)


def layout_of(mesh: Mesh) -> Layout:
    """The layout a mesh was made for."""
    return Layout(**mesh.shape)


def spec_of(axes: Sequence[str | None]) -> P:
    """The partition spec of an array with these logical axes."""
    return P(*(MESH_AXES[axis] for axis in axes))


def parameter_axes(path: Sequence[str]) -> tuple[str | None, ...]:
    """Logical axes of the parameter at a path of names, which may end with the field of a packed tensor."""
    *above, name = path[:-1] if path[-1] in PACKED_FIELDS else path
    if above[-2:] == ["moe", "tiles"]:
        return TILED_EXPERTS[name]
    table = EXPERTS if above[-1:] == ["moe"] and name in EXPERTS else PARAMETERS
    return table.get(name, ())


def parameter_sharding(path: Sequence[str], shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """Where the array of `shape` at a path of names lives; raises where the mesh does not divide it."""
    axes = parameter_axes(path)
    spec = spec_of(axes)
    for size, axis, names in zip(shape, axes, spec):
        ways = math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))
        if size % ways:
            name = "/".join(path)
            raise UserError(f"mesh: {name} {list(shape)}: its {size} rows along {axis} are not a multiple of {ways}")
    return NamedSharding(mesh, spec)


def parameter_shardings(params: Any, mesh: AnyMesh) -> Any:
    """The tree of `params` (arrays or shapes, or a state of training that holds such) with a sharding for every array.

    What an optimiser keeps of a parameter ends with the parameter's path, so it lives where the parameter does.
    """

    def of(path, leaf) -> NamedSharding:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return parameter_sharding(names, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(of, params)


def weight_bytes(config: ModelConfig, mesh: AnyMesh) -> int:
    """Bytes of a checkpoint's weights on each device."""
    total = 0
    for weight in weights(config):
        for part in weight.parts:
            path = (*weight.path, *filter(None, [part.field]))
            held = parameter_sharding(path, part.shape, mesh).shard_shape(part.shape)
            total += math.prod(held) * DTYPES[part.dtype].itemsize
    return total


def check_fits(config: ModelConfig, mesh: Mesh) -> None:
    """Raises, before anything is allocated, unless the mesh divides the model and its devices hold their parts."""
    layout_of(mesh).check_divides(config)
    needed, limit = weight_bytes(config, mesh), device_memory(mesh)
    if limit is not None and needed > limit:
        raise UserError(
            f"mesh: {needed / 1e9:.1f} GB of weights for each of {mesh.size} devices, which hold {limit / 1e9:.1f} GB; "
            f"{-(-needed * mesh.size // limit)} devices or more are needed"
        )


def check_rows(rows: int, mesh: Mesh | None, what: str) -> None:
    """Raises unless every copy of the model on the mesh gets as many of the `rows` of a batch."""
    copies = 1 if mesh is None else layout_of(mesh).data
    if rows % copies:
        raise UserError(f"mesh: {rows} {what} cannot be shared equally by data={copies} copies of the model")


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that the smallest of this process's devices can hold; None where a device does not say."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return min((entry["bytes_limit"] for entry in stats if "bytes_limit" in entry), default=None)


def place(params: Any, mesh: Mesh) -> Any:
    """`params` on the mesh; every device gets its own part only."""
    return jax.device_put(params, parameter_shardings(params, mesh))


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Arrays whose first axis is the batch, each row where its copy of the model is. Without a mesh, unchanged."""
    return batch if mesh is None else jax.device_put(batch, NamedSharding(mesh, spec_of(("batch",))))


def place_cache(cache: Any, mesh: Mesh | None) -> Any:
    """A cache of any kind on the mesh: keys and values by heads, the rest replicated. Without a mesh, unchanged."""
    return cache if mesh is None else jax.device_put(cache, cache_shardings(cache, mesh))


def cache_shardings(cache: Any, mesh: AnyMesh) -> Any:
    """The tree of a cache (arrays or shapes, or a state of decoding that holds one) with a sharding for every array."""

    def of(node: Any) -> Any:
        sharding = NamedSharding(mesh, spec_of(CACHE if isinstance(node, LayerCache) else ()))
        return jax.tree.map(lambda leaf: sharding, node)

    return jax.tree.map(of, cache, is_leaf=lambda node: isinstance(node, LayerCache))


def shapes_on(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` as they would lie: what programs are lowered for and checkpoints restored to."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )


@contextmanager
def using(mesh: Mesh | None) -> Iterator[None]:
    """What is traced inside runs on `mesh`. For use within jit; around it, `jax.set_mesh` does the same."""
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def gathered(x: Any, axes: Sequence[str | None] = ("batch",)) -> Any:
    """Arrays, brought together on every device but for `axes`; without a mesh, as they are."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, spec_of(axes))


def rows_of(table_CD: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids], for a table whose rows the devices of a replica share."""
    if current_mesh() is None:
        return table_CD[ids]

    # By hand: for a single id the compiler would gather the whole table.
    def own_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
        local = ids - jax.lax.axis_index(REPLICA) * table.shape[0]
        is_held = (local >= 0) & (local < table.shape[0])
        picked = table[jnp.where(is_held, local, 0)]
        return jax.lax.psum(jnp.where(is_held[..., None], picked, 0), REPLICA)

    specs = (spec_of(PARAMETERS["embed"]), spec_of(("batch",)))
    return jax.shard_map(own_rows, in_specs=specs, out_specs=spec_of(("batch",)), check_vma=False)(table_CD, ids)


def current_mesh() -> AbstractMesh | None:
    """The mesh of `using`, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh
