"""The native step as operations of JAX: arrays in, arrays out, caches updated in place where they are donated."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.decode_step.geometry import Drafter, Target
from pallas_kernels.decode_step.native import build
from pallas_kernels.decode_step.native.layout import LANES
from pallas_kernels.decode_step.native.names import numbers_of, sizes_of
from pallas_kernels.decode_step.schedule import (
    MOST_SHARES,
    Kind,
    Row,
    claimed_rows,
    context_phases,
    draft_phases,
    encode,
    step_phases,
)

CHUNK = 128  # the most tokens of a row in one call


class Packed(NamedTuple):
    """All weights of a model, and where each lies: what `layout.Blob.finish` returns."""

    bytes: UInt8[Array, "bytes"]
    directory: Int[Array, "slots 5"]


class Running(NamedTuple):
    """How a step runs, for tests: on which instruction-set path (None: the fastest), on how many threads (0: all that
    XLA has and that have a core), and with random delays in its rows (a seed; 0: none)."""

    path: str | None = None
    threads: int = 0
    delays: int = 0


NORMALLY = Running()


class TargetCache(NamedTuple):
    """Keys and values of all layers of a kind; keys of 16 rows lie side by side, so that no score crosses lanes."""

    global_keys: Float[Array, "L B K S/16 Q 16"]
    global_values: Float[Array, "L B K S V"]
    sliding_keys: Float[Array, "L B K S/16 Q 16"]
    sliding_values: Float[Array, "L B K S V"]


class DraftCache(NamedTuple):
    """The rings of all draft layers, see `TargetCache`."""

    keys: Float[Array, "L B K S/16 Q 16"]
    values: Float[Array, "L B K S V"]


class StepOutputs(NamedTuple):
    """Logits of the shown tokens and the first of the largest; the final and the auxiliary hidden states; how many
    tokens each expert had; the cache."""

    logits: Float[Array, "B _ C"]
    hidden: Float[Array, "B T D"]
    aux: Float[Array, "B T Z"]
    expert_counts: Int[Array, "L E"]
    best: Int[Array, "B _"]
    cache: TargetCache


def _rounded(count: int) -> int:
    """Cache rows and value dimensions come in whole vectors."""
    return -(-count // LANES) * LANES


def _empty(lead: tuple[int, ...], rows: int, head_dim: int, value_dim: int) -> tuple[Array, Array]:
    keys = jnp.zeros((*lead, _rounded(rows) // LANES, head_dim, LANES))
    return keys, jnp.zeros((*lead, _rounded(rows), _rounded(value_dim)))


def init_cache(target: Target, batch: int, capacity: int) -> TargetCache:
    """An empty cache. A ring holds a window and the longest chunk, so that a chunk overwrites nothing that it needs."""
    arrays: list[Array] = []
    for is_sliding, rows in ((False, capacity), (True, min(capacity, target.window - 1 + CHUNK))):
        layers = sum(layer.is_sliding == is_sliding for layer in target.layers)
        heads = target.sliding_kv_heads if is_sliding else target.global_kv_heads
        arrays += _empty((layers, batch, heads), rows, target.head_dim, target.value_dim)
    return TargetCache(*arrays)


def init_draft_cache(drafter: Drafter, batch: int) -> DraftCache:
    """Empty rings. They hold as much as a block's rows see."""
    lead = (drafter.num_layers, batch, drafter.kv_heads)
    return DraftCache(*_empty(lead, drafter.window + drafter.block, drafter.head_dim, drafter.head_dim))


def step(
    target: Target,
    aux_layers: tuple[int, ...],
    weights: Packed,
    tokens_BT: Int[Array, "B T"],
    cache: TargetCache,
    lengths_B: Int[Array, "B"],
    counts_B: Int[Array, "B"],
    last_only: bool,
    running: Running = NORMALLY,
    media_RD: Float[Array, "R D"] | None = None,
) -> StepOutputs:
    """Reads the first `counts_B` tokens of each row after `lengths_B` others; logits of all T, or of the last one.

    Id `target.vocab` + r is no token, but row r of `media_RD` in the place of an embedding.
    """
    batch, steps = tokens_BT.shape
    media_RD = jnp.zeros((0, target.width)) if media_RD is None else media_RD.astype(jnp.float32)
    if steps > CHUNK:
        raise ValueError(
            f"step: {steps} tokens of each row in one call; at most {CHUNK}, or a ring would overwrite them"
        )
    shown, width, sizes = 1 if last_only else steps, target.width, sizes_of(target)
    layers = [layer.is_sliding + 2 * layer.has_experts for layer in target.layers]
    results = [
        _f32(batch, shown, target.vocab),
        _f32(batch, steps, width),
        _f32(batch, steps, len(aux_layers) * width),
        _i32(sum(layer.has_experts for layer in target.layers), target.experts),
        _i32(batch, shown),
    ]
    logits, hidden, aux, expert_counts, best, *cached = _call(
        "step",
        running,
        claimed_rows(step_phases(target, steps, batch), _cores()),
        (weights, tokens_BT, media_RD, lengths_B, counts_B),
        results,
        _scratch(running, "step", sizes, batch * steps, batch * shown),
        updated=cache,
        sizes=sizes,
        numbers=numbers_of(target),
        layers=np.array(layers, np.int32),
        aux_layers=np.array(aux_layers, np.int32),
    )
    return StepOutputs(logits, hidden, aux, expert_counts, best, TargetCache(*cached))


def draft(
    drafter: Drafter,
    target_weights: Packed,
    weights: Packed,
    anchors_B: Int[Array, "B"],
    lengths_B: Int[Array, "B"],
    text_BS: Int[Array, "B S"],
    cache: DraftCache,
    is_greedy: bool,
    running: Running = NORMALLY,
) -> tuple[Int[Array, "B M"], Float[Array, "B M"], Float[Array, "B M C"]]:
    """The drafts after each anchor, how likely each is after those before it, and all logits without the bias.

    Drafts are the most likely tokens, and only those of a greedy strategy: others are drawn from the logits.
    """
    batch, drafts, sizes = anchors_B.shape[0], drafter.block - 1, sizes_of(drafter)
    tokens_BM, likely_BM, logits_BMC = _call(
        "draft",
        running,
        claimed_rows(draft_phases(drafter, batch, is_greedy), _cores()),
        (target_weights, weights, anchors_B, lengths_B, text_BS, cache),
        [_i32(batch, drafts), _f32(batch, drafts), _f32(batch, drafts, drafter.target_vocab)],
        _scratch(running, "draft", sizes, batch),
        sizes=sizes,
        numbers=numbers_of(drafter),
    )
    return tokens_BM, likely_BM, logits_BMC


def update_context(
    drafter: Drafter,
    weights: Packed,
    aux_BTZ: Float[Array, "B T Z"],
    lengths_B: Int[Array, "B"],
    counts_B: Int[Array, "B"],
    cache: DraftCache,
    running: Running = NORMALLY,
) -> DraftCache:
    """The cache after the first `counts_B` tokens that the target has read after `lengths_B` others."""
    batch, steps, width = aux_BTZ.shape
    sizes = sizes_of(drafter)
    updated = _call(
        "context",
        running,
        claimed_rows(context_phases(drafter, steps, batch), _cores()),
        (weights, aux_BTZ, lengths_B, counts_B),
        [],
        _scratch(running, "context", sizes, batch, steps, width),
        updated=cache,
        sizes=sizes,
        numbers=numbers_of(drafter),
    )
    return DraftCache(*updated)


def least_kept(p: Float[Array, "*B C"], weights: Float[Array, "*B C"], wanted: Array | float) -> Float[Array, "*B 1"]:
    """The largest entry t of `p`, all from 0 to 1, for which the `weights` of all entries from t on sum up to `wanted`,
    a number or [*B, 1]; 0 if none does. Sums are those of float64: no rounding of theirs decides.
    """
    shape, count = p.shape[:-1], math.prod(p.shape[:-1])
    shares = min(count, MOST_SHARES)
    given = [array.reshape(count, p.shape[-1]) for array in (p, weights)]
    wanted_R = jnp.broadcast_to(jnp.asarray(wanted, jnp.float32), (*shape, 1)).reshape(count)
    alone = Running(threads=1 if shares == 1 else 0)
    kept_R = _call("select", alone, _shares(shares), (*given, wanted_R), [_f32(count)])[0]
    return kept_R.reshape(*shape, 1)


def read_stream(weights: Packed, count: int, before: UInt8[Array, "_"] | None = None) -> UInt8[Array, "_"]:
    """Reads the first `count` bytes and does nothing else, on all threads: a bound on how fast a step could be.

    `before` is what a call before it gave: XLA would do equal calls that do not depend on each other once.
    """
    sums = jax.ShapeDtypeStruct((8 * MOST_SHARES,), jnp.uint8)
    before = jnp.zeros(sums.shape, sums.dtype) if before is None else before
    return _call("stream", NORMALLY, _shares(MOST_SHARES), (weights.bytes, before), [sums], count=np.int64(count))[0]


@functools.cache
def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(count: int) -> list[Row]:
    """A table of one phase."""
    return [Row(Kind.NOTHING, 0, share, count, (), (0,)) for share in range(count)]


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _scratch(running: Running, name: str, sizes: np.ndarray, *counts: int) -> jax.ShapeDtypeStruct:
    """Room for what a round keeps between its rows; the library knows how much that is."""
    count = getattr(build.load(running.path), f"mimo_{name}_scratch")
    count.restype = ctypes.c_int64
    return jax.ShapeDtypeStruct((count(sizes.ctypes.data_as(ctypes.c_void_p), *counts),), jnp.uint8)


def _call(
    name: str,
    running: Running,
    rows: list[Row],
    given: Any,
    results: list[jax.ShapeDtypeStruct],
    scratch: jax.ShapeDtypeStruct | None = None,
    updated: tuple[Array, ...] = (),
    **attributes: np.ndarray | np.generic,
) -> Sequence[Array]:
    """Runs a table on a tree of arrays. Returns the results, then what was `updated`, in its place."""
    operands = [jnp.asarray(encode(rows)), *jax.tree.leaves(given), *updated]
    shapes = [*results, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in updated)]
    aliases = {len(operands) - len(updated) + place: len(results) + place for place in range(len(updated))}
    work = [] if scratch is None else [scratch]
    call = jax.ffi.ffi_call(_registered(name, running.path), shapes + work, input_output_aliases=aliases)
    found = call(*operands, **attributes, threads=np.int32(running.threads), delays=np.int32(running.delays))
    return found[: len(shapes)]


@functools.cache
def _registered(name: str, path: str | None) -> str:
    """The name under which XLA knows a function of a path's library."""
    unique = f"mimo_{name}_{path or build.usable_paths()[0]}"
    jax.ffi.register_ffi_target(unique, jax.ffi.pycapsule(getattr(build.load(path), f"mimo_{name}")), platform="cpu")
    return unique
