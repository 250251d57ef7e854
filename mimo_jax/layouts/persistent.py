"""Weights as the persistent kernel of Hopper reads them: stacks over layers, in tiles of the tensor core's operands.

The bits are those of the files. Each device has its share of heads, features and vocabulary, and all of the embedding
and the routers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mimo_jax.config.geometry import target_of
from mimo_jax.config.model import GLOBAL, SLIDING, ModelConfig
from mimo_jax.layouts import packed
from mimo_jax.modeling.layers import rotary_frequencies
from mimo_jax.weights import BlockFp8Tensor, MxTensor, Params
from mimo_jax.weights.params import STACKS, is_moe
from pallas_kernels import persistent
from pallas_kernels.decode_step import stored_fp8
from pallas_kernels.expert_matmul import alternate
from pallas_kernels.fp8_matmul import BLOCK
from pallas_kernels.persistent import FP8_SEGMENT, LARGEST_SCALE, Kind, Matrix, StepPlan, Weights

PERSISTENT = "persistent"  # the parameter that all others are in
SHARED = ("embed", "head")  # and those that drafters read, once more
UNBOUND = 16  # rows of a cache where none is meant
KEPT = {MxTensor: "mxfp4", BlockFp8Tensor: "fp8"}


def plan_of(
    config: ModelConfig,
    formats: Mapping[Kind, str],
    tokens: int,
    capacity: int = UNBOUND,
    aux_layers: tuple[int, ...] = (),
    **options: int,
) -> StepPlan:
    """The kernel's for a model whose weights are stored in these formats."""
    has_sinks = config.has_sink(GLOBAL), config.has_sink(SLIDING)
    return StepPlan(target_of(config), formats, tokens, capacity, aux_layers, has_sinks, **options)


def reason_against(config: ModelConfig, params: Params) -> str | None:
    """What keeps the kernel from serving these parameters on one device."""
    for node in filter(is_moe, jax.tree.leaves(params, is_leaf=is_moe)):
        for name in STACKS:
            if isinstance(node[name], MxTensor) and (largest := int(node[name].scales.max())) > LARGEST_SCALE:
                return f"{name}: scale byte {largest} is above {LARGEST_SCALE}"
    return plan_of(config, formats_of(params), persistent.MOST_TOKENS).unsupported()


def for_device(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Parameters of the step, and what drafters read beside them. Layers that predict ahead (MTP) are left out."""
    own = pack(config, params, plan_of(config, formats_of(params), persistent.MOST_TOKENS))
    shared = packed.pack(config, {name: params[name] for name in SHARED})[1]
    return config, {PERSISTENT: jax.tree.map(jnp.asarray, own), **shared}


def formats_in(config: ModelConfig, params: Params) -> tuple[tuple[Kind, str], ...]:
    """How each kind of product of this layout is stored, by the shapes."""

    def shape(kind: Kind, format: str) -> tuple[int, int]:
        matrix = plan_of(config, {kind: format}, 1).matrix(kind)
        return matrix.columns.chunks, matrix.slot_words

    matrices = params[PERSISTENT].matrices
    return tuple(
        (kind, next(format for format in persistent.FORMATS if shape(kind, format) == held.shape[2:]))
        for kind, held in matrices.items()
    )


def formats_of(params: Params) -> dict[Kind, str]:
    """How each kind of product is stored; layers are alike."""
    found: dict[Kind, str] = {Kind.HEAD: _format(params["head"])}
    for name, layer in params.items():
        if not name.startswith("layers_"):
            continue
        attention = layer["attention"]
        found[Kind.QKV] = _format(attention["qkv" if "qkv" in attention else "q"])
        found[Kind.OUTPUT] = _format(attention["o"])
        if "moe" in layer:
            found |= {Kind.EXPERT_GATE_UP: _format(layer["moe"]["gate"])}
        else:
            found |= {Kind.GATE_UP: _format(layer["mlp"]["gate"]), Kind.DOWN: _format(layer["mlp"]["down"])}
    return found


def _format(weight: Any) -> str:
    return KEPT.get(type(weight), "bf16")


def pack(config: ModelConfig, params: Params, plan: StepPlan, rank: int = 0) -> Weights:
    """One device's share, as NumPy arrays."""
    layers = [params[f"layers_{index}"] for index in range(config.num_layers)]
    dense = [layer["mlp"] for layer in layers if "mlp" in layer]
    moe = [layer["moe"] for layer in layers if "moe" in layer]
    share = _Share(plan, rank)
    matrices = {
        Kind.QKV: share.stack(Kind.QKV, (share.qkv(layer["attention"]) for layer in layers)),
        Kind.OUTPUT: share.stack(Kind.OUTPUT, (share.cols(_parts(layer["attention"]["o"])) for layer in layers)),
        Kind.HEAD: share.stack(Kind.HEAD, [share.rows(_parts(params["head"]))]),
    }
    if dense:
        matrices[Kind.GATE_UP] = share.stack(Kind.GATE_UP, (share.gate_up(mlp) for mlp in dense))
        matrices[Kind.DOWN] = share.stack(Kind.DOWN, (share.cols(_parts(mlp["down"])) for mlp in dense))
    down = np.zeros((0, 0), np.int32)
    if moe:
        matrices[Kind.EXPERT_GATE_UP] = share.stack(Kind.EXPERT_GATE_UP, (share.gate_up(one) for one in moe))
        down = np.concatenate([_flat(persistent.pack_down(*share.cols(_parts(one["down"])))) for one in moe])
    norms = [layer[name] for layer in layers for name in ("input_norm", "post_norm")] + [params["norm"]]
    router = [persistent.pack_router(np.asarray(one["router"], np.float32), plan.router) for one in moe]
    return Weights(
        embed=_words(np.asarray(params["embed"]).astype(ml_dtypes.bfloat16)),
        gains=persistent.pack_gains([np.asarray(norm["weight"], np.float32) for norm in norms]),
        sinks=(share.sinks(config, layers, GLOBAL), share.sinks(config, layers, SLIDING)),
        rotary=(rotary_table(config, GLOBAL, plan.capacity), rotary_table(config, SLIDING, plan.capacity)),
        matrices=matrices,
        expert_down=down,
        router=np.stack(router) if moe else np.zeros((0, 0, 0, 0), np.int32),
        router_bias=np.concatenate([np.zeros(0, np.float32), *(np.asarray(one["router_bias"]) for one in moe)]),
    )


def rotary_tables(config: ModelConfig, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Of global and of sliding layers, on the device."""
    return jnp.asarray(rotary_table(config, GLOBAL, capacity)), jnp.asarray(rotary_table(config, SLIDING, capacity))


def rotary_table(config: ModelConfig, kind: int, capacity: int) -> np.ndarray:
    """Cosines of all positions, then sines: float32 [2 * capacity * rotary / 2]. Angles are formed in float32."""
    angles = np.arange(capacity, dtype=np.float32)[:, None] * rotary_frequencies(config.rotary_dim, config.theta(kind))
    return np.concatenate([np.cos(angles).reshape(-1), np.sin(angles).reshape(-1)])


Parts = tuple[Any, Any]  # a matrix' values or codes, and its scales or None: one for each 32 or 64 columns


def _parts(weight: Any) -> Parts:
    if isinstance(weight, MxTensor):
        return np.asarray(weight.codes), np.asarray(weight.scales)
    if isinstance(weight, BlockFp8Tensor):
        stored = stored_fp8(np.asarray(weight.codes), np.asarray(weight.scales))
        return stored.values.view(np.uint8), np.repeat(np.asarray(stored.scales), BLOCK // FP8_SEGMENT, axis=-1)
    return np.asarray(weight).astype(ml_dtypes.bfloat16), None


def _map(function: Any, *parts: Parts) -> Parts:
    """The same to values and to scales."""
    values, scales = zip(*parts)
    return function(*values), None if scales[0] is None else function(*scales)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1)


def _words(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.int32).reshape(-1)


class _Share:
    """What one of several devices holds of a matrix."""

    def __init__(self, plan: StepPlan, rank: int) -> None:
        self.plan, self.rank = plan, rank

    def _own(self, array: np.ndarray, axis: int) -> np.ndarray:
        return np.split(array, self.plan.devices, axis=axis)[self.rank]

    def rows(self, parts: Parts) -> Parts:
        return _map(lambda array: self._own(array, -2), parts)

    def cols(self, parts: Parts) -> Parts:
        return _map(lambda array: self._own(array, -1), parts)

    def stack(self, kind: Kind, parts: Iterable[Parts]) -> np.ndarray:
        """int32 [stack, row blocks, chunks, words]; matrices of fewer rows end in zeros."""
        matrix: Matrix = self.plan.matrix(kind)
        stacks = [persistent.pack(matrix, *each) for each in parts]
        return np.concatenate([one.reshape(-1, *one.shape[-3:]) for one in stacks])

    def qkv(self, attention: Params) -> Parts:
        """Chunks of a fused projection, or of three, are dealt out to devices."""
        if "qkv" in attention:
            held = _parts(attention["qkv"])
            chunks = _map(lambda array: self._own(array, 0), held) if self.plan.devices > 1 else held
            return _map(lambda array: array.reshape(-1, array.shape[-1]), chunks)
        parts = [self.rows(_parts(attention[name])) for name in "qkv"]
        return _map(lambda *arrays: np.concatenate(arrays, axis=-2), *parts)

    def gate_up(self, mlp: Params) -> Parts:
        return _map(alternate, *(self.rows(_parts(mlp[name])) for name in ("gate", "up")))

    def sinks(self, config: ModelConfig, layers: Sequence[Params], kind: int) -> np.ndarray:
        """Of all layers of a kind, one after the other."""
        held = [layer["attention"] for layer, of in zip(layers, config.layer_pattern) if of == kind]
        found = [self._own(np.asarray(one["sink"], np.float32), 0) for one in held if "sink" in one]
        return np.concatenate(found or [np.zeros(1, np.float32)])
