"""What a launch reads and writes, as shapes: of one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_step.assigned import ROLES
from pallas_kernels.decode_step.hopper.attention import KEYS
from pallas_kernels.decode_step.hopper.config import GAINS, ROWS
from pallas_kernels.decode_step.hopper.machine import STAMPS, Buffers, Weights
from pallas_kernels.decode_step.hopper.plan import PAGE_PARTS, StepPlan
from pallas_kernels.decode_step.hopper.roles import FIELDS
from pallas_kernels.decode_step.hopper.sync import FAULT
from pallas_kernels.decode_step.hopper.table import counters_of
from pallas_kernels.decode_step.schedule import Kind

WORDS, FLOATS = jnp.int32, jnp.float32


def weight_shapes(plan: StepPlan) -> Weights:
    """`jax.ShapeDtypeStruct` of each array."""
    t = plan.target
    layers = _layers(plan)
    experts = sum(layer.has_experts for layer in t.layers)
    stacks = {
        Kind.QKV: len(t.layers),
        Kind.OUTPUT: len(t.layers),
        Kind.GATE_UP: len(t.layers) - experts,
        Kind.DOWN: len(t.layers) - experts,
        Kind.EXPERT_GATE_UP: experts * t.experts,
        Kind.HEAD: 1,
    }

    def matrices(kind: Kind) -> Any:
        matrix = plan.matrix(kind)
        return _shape(WORDS, stacks[kind], matrix.row_blocks, matrix.columns.chunks, matrix.slot_words)

    def sinks(is_sliding: bool) -> Any:
        return _shape(FLOATS, layers[is_sliding] * t.heads if plan.has_sinks[is_sliding] else 1)

    router, rotary = plan.router, (_shape(FLOATS, plan.capacity * t.rotary),) * 2
    down = t.width // ROWS * plan.down.tile_words
    return Weights(
        embed=_shape(WORDS, plan.vocab_rows * t.width // 2),
        gains=_shape(WORDS, (2 * len(t.layers) + 1) * t.width + GAINS),
        sinks=(sinks(False), sinks(True)),
        rotary=rotary,
        matrices={kind: matrices(kind) for kind in plan.products},
        expert_down=_shape(WORDS, experts * t.experts, down),
        router=_shape(WORDS, experts, plan.ctas, router.columns.chunks, router.slot_words),
        router_bias=_shape(FLOATS, experts * t.experts),
    )


def buffer_shapes(plan: StepPlan) -> Buffers:
    """`jax.ShapeDtypeStruct` of each array, but of times."""
    t, columns = plan.target, plan.columns
    layers, experts = _layers(plan), sum(layer.has_experts for layer in t.layers)
    dense_hidden = plan.inputs(Kind.DOWN).words if Kind.DOWN in plan.products else 0
    partial = [kind for kind in plan.kinds if not kind]
    return Buffers(
        x=_shape(FLOATS, columns * t.width),
        stream=_shape(WORDS, plan.inputs(Kind.QKV).words),
        squares=_shape(FLOATS, plan.ctas * columns),
        qkv=_shape(FLOATS, columns * plan.qkv_rows),
        partial=_shape(FLOATS, plan.partial_words if partial else 1),
        attended=_shape(WORDS, plan.inputs(Kind.OUTPUT).words),
        scores=_shape(FLOATS, columns * t.experts),
        hidden=_shape(WORDS, max(dense_hidden, PAGE_PARTS * plan.hidden_part)),
        parts=_shape(FLOATS, 2 * plan.ctas * plan.devices * plan.own_words if plan.devices > 1 else 1),
        candidates=_shape(WORDS, plan.ctas * 2 * columns),
        caches=(_cache(plan, False, layers[False]), _cache(plan, True, layers[True])),
        logits=_shape(FLOATS, columns * t.vocab),
        last=_shape(FLOATS, columns * t.width),
        aux=_shape(FLOATS, max(1, columns * len(plan.aux_layers) * t.width)),
        expert_counts=_shape(WORDS, max(1, experts * t.experts)),
        best=_shape(WORDS, columns),
        best_logits=_shape(FLOATS, columns),
        counts=_shape(WORDS, max(counters_of(plan), FIELDS)),  # the first of them are copied as a row is
        fault=_shape(WORDS, len(FAULT)),
    )


def times_shape(table: np.ndarray) -> Any:
    """That of `Buffers.times` for a table's rows."""
    return _shape(WORDS, *table.shape[:2], len(ROLES), len(STAMPS))


def zeros(shapes: Any) -> Any:
    """Arrays as they are before the first launch. Padding of inputs stays zero for ever."""
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _layers(plan: StepPlan) -> dict[bool, int]:
    return {kind: sum(layer.is_sliding == kind for layer in plan.target.layers) for kind in (False, True)}


def _cache(plan: StepPlan, is_sliding: bool, layers: int) -> Any:
    if not layers:
        return _shape(WORDS, 1, 1)
    config = plan.attention(is_sliding)
    return _shape(WORDS, layers * config.kv_heads * config.cache_rows // KEYS, config.slot_words)


def _shape(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(map(int, dims)), np.dtype(dtype))
