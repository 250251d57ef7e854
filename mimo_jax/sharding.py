"""Where every array lives on a mesh: one table from axes to mesh axes. The axes come from the table of parameters, or
from a container that knows its own (a cache, a layout's weights).

The compiler follows. Where it would move more than it must, modules call `embedding_lookup` and `replicate`, or take
the mesh in hand (`modeling.experts`, `layouts.packed`); without a mesh all that is nothing (docs/LOG.md says what each
of them avoids).

A mesh has three axes. "data" splits the batch. The devices of one replica are "expert" x "tensor": routed experts are
distributed over the first and split over the second, everything else is split over both. Tensor parallel over 8 is 1 x
8.
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
from jaxtyping import Array, Float, Int

from mimo_jax.config.model import GLOBAL, SLIDING, FileFormat, ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.weights.params import Weight, array_path, part_bytes, path_names, row_of, weights

DATA, EXPERT, TENSOR = "data", "expert", "tensor"
REPLICA = (EXPERT, TENSOR)  # all devices that hold one copy of the model

# Axis -> mesh axes; an axis that is not here lies whole on every device. Those of parameters: `weights.params`.
MESH_AXES: dict[str, str | tuple[str, ...]] = {
    "batch": DATA,
    "vocab": REPLICA,
    "chunks": REPLICA,  # of a fused QKV: heads with their key/value heads
    **dict.fromkeys(("heads", "query_rows", "key_rows", "value_rows", "head_outputs"), REPLICA),
    "features": REPLICA,  # of a dense MLP
    **dict.fromkeys(("two_widths", "aux_widths"), REPLICA),  # what a projection without heads reads
    "router_rows": REPLICA,
    "experts": EXPERT,
    "expert_features": TENSOR,
}
AnyMesh = Mesh | AbstractMesh
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis: 8 `tensor` share every matrix, 8 `expert` share the experts, `data` splits rows."""

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


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of this shape over `devices` (default: all that JAX has), neighbours along the last axis."""
    devices = jax.devices() if devices is None else devices
    if len(devices) < shape.devices:
        raise UserError(
            f"mesh: data={shape.data} x expert={shape.expert} x tensor={shape.tensor} needs {shape.devices} "
            f"devices; {len(devices)} found"
        )
    grid = np.array(devices[: shape.devices]).reshape(shape.data, shape.expert, shape.tensor)
    return Mesh(grid, (DATA, EXPERT, TENSOR), axis_types=(AxisType.Auto,) * 3)


def shape_of(mesh: Mesh) -> MeshShape:
    """The shape a mesh was made with."""
    return MeshShape(**mesh.shape)


def spec_of(axes: Sequence[str | None]) -> P:
    """The partition spec of an array with these axes."""
    return P(*(None if axis is None else MESH_AXES.get(axis) for axis in axes))


def parameter_axes(path: Sequence[str]) -> Axes:
    """Axes of the parameter at a path of names, which may end with a packed tensor's field; () where there is none."""
    row = row_of(path)
    return () if row is None else tuple(row.axes.split())


def parameter_sharding(path: Sequence[str], shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """Where the array of `shape` at a path of names lives; raises where the mesh does not divide it."""
    return _sharding(path, shape, parameter_axes(path), mesh)


def _sharding(path: Sequence[str], shape: tuple[int, ...], axes: Axes, mesh: AnyMesh) -> NamedSharding:
    spec = spec_of(axes)
    for size, axis, names in zip(shape, axes, spec):
        ways = math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))
        if size % ways:
            name = "/".join(path)
            raise UserError(f"mesh: {name} {list(shape)}: its {size} rows along {axis} are not a multiple of {ways}")
    return NamedSharding(mesh, spec)


def shardings(tree: Any, mesh: AnyMesh) -> Any:
    """A tree of parameters, caches or states that hold such (arrays or shapes) with a sharding for every array.

    A container with a method `axes` says where its arrays lie. All others are placed by their paths: what an optimiser
    keeps of a parameter ends with the parameter's path, so it lives where the parameter does.
    """

    def of(path: Any, node: Any) -> Any:
        names = path_names(path)
        if not hasattr(node, "axes"):
            return parameter_sharding(names, node.shape, mesh)
        return jax.tree.map(lambda leaf, axes: _sharding(names, leaf.shape, axes, mesh), node, node.axes())

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=lambda node: hasattr(node, "axes"))


def weight_bytes(table: Iterator[Weight], mesh: AnyMesh) -> int:
    """Bytes of a checkpoint's weights on each device."""
    parts = (part for weight in table for part in weight.parts)
    return sum(part_bytes(part, parameter_sharding(array_path(part), part.shape, mesh)) for part in parts)


def check_fits(config: ModelConfig, file_format: FileFormat, mesh: Mesh) -> None:
    """Raises, before anything is allocated, unless the mesh divides the model and its devices hold their parts."""
    shape_of(mesh).check_divides(config)
    needed, limit = weight_bytes(weights(config, file_format), mesh), device_memory(mesh)
    if limit is not None and needed > limit:
        raise UserError(
            f"mesh: {needed / 1e9:.1f} GB of weights for each of {mesh.size} devices, which hold {limit / 1e9:.1f} GB; "
            f"{-(-needed * mesh.size // limit)} devices or more are needed"
        )


def check_rows(rows: int, mesh: Mesh | None, what: str) -> None:
    """Raises unless every copy of the model on the mesh gets as many of the `rows` of a batch."""
    copies = 1 if mesh is None else shape_of(mesh).data
    if rows % copies:
        raise UserError(f"mesh: {rows} {what} cannot be shared equally by data={copies} copies of the model")


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that the smallest of this process's devices can hold; None where a device does not say."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return min((entry["bytes_limit"] for entry in stats if "bytes_limit" in entry), default=None)


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Parameters or caches on the mesh; every device gets its own part only. Without a mesh, unchanged."""
    return tree if mesh is None else jax.device_put(tree, shardings(tree, mesh))


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Arrays whose first axis is the batch, each row where its copy of the model is. Without a mesh, unchanged."""
    return batch if mesh is None else jax.device_put(batch, NamedSharding(mesh, spec_of(("batch",))))


def shapes_on(tree: Any, mesh: AnyMesh) -> Any:
    """Shapes and dtypes of `tree` as they would lie: what programs are lowered for and checkpoints restored to."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings(tree, mesh)
    )


@contextmanager
def using(mesh: Mesh | None) -> Iterator[None]:
    """What is traced inside runs on `mesh`. For use within jit; around it, `jax.set_mesh` does the same."""
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def replicate(x: Any, axes: Sequence[str | None] = ("batch",)) -> Any:
    """Arrays, brought together on every device but for `axes`; without a mesh, as they are."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, spec_of(axes))


def embedding_lookup(table_CD: Float[Array, "C D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """table[ids], for a table whose rows the devices of a replica share."""
    if current_mesh() is None:
        return table_CD[ids]

    # By hand: for a single id the compiler would gather the whole table.
    def own_rows(table: Array, ids: Array) -> Array:
        local = ids - jax.lax.axis_index(REPLICA) * table.shape[0]
        is_held = (local >= 0) & (local < table.shape[0])
        picked = table[jnp.where(is_held, local, 0)]
        return jax.lax.psum(jnp.where(is_held[..., None], picked, 0), REPLICA)

    specs = (spec_of(("vocab", None)), spec_of(("batch",)))
    return jax.shard_map(own_rows, in_specs=specs, out_specs=spec_of(("batch",)), check_vma=False)(table_CD, ids)


def current_mesh() -> AbstractMesh | None:
    """The mesh of `using`, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh
