"""The op through Triton, for GPUs from Ampere to Blackwell: keys distributed over programs, scores never in memory.

Split s takes blocks s, s + SPLITS, s + 2 SPLITS ... of the keys. So all have the same work after any number of tokens.
A token's sums are taken in one order, whatever the cache's length and capacity, and whoever shares its tile of rows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import triton_call
from pallas_kernels.backends import Shaped
from pallas_kernels.devices import capability
from pallas_kernels.hardware import GPUS

ROWS = 128  # pairs of a token and a query head that share what they read: a drafted block of 8 over 16 heads
KEYS = 64  # of a block
PROGRAMS = GPUS["h200"].sms  # each SM has room for one
STAGES = 3  # blocks in a program's shared memory or on their way to it: 168 KB on Hopper
SMALL_STAGES = 2
SMALL = (86, 89, 120, 121)  # capabilities of GPUs whose programs share 99 KB only
SPLITS_AT_ONCE = 16  # that are merged
NARROWEST = 16  # `dot` takes no less
WIDEST_KEY, WIDEST_VALUE = 192, 128  # of the real models; more would not fit the shared memory of every GPU
MAX_ELEMENTS = 2**31 - 1  # elements of a head, which the kernel counts in 32 bits


def unsupported(q_BTHQ: Shaped, k_BKSQ: Shaped, v_BKSV: Shaped) -> str | None:
    """What keeps this backend from serving a call."""
    if (reason := triton_call.missing()) is not None:
        return reason
    for name, array in (("queries", q_BTHQ), ("keys", k_BKSQ), ("values", v_BKSV)):
        if array.dtype != jnp.bfloat16:
            return f"{name} of dtype {array.dtype}, not bfloat16"
    capacity, width, v_width = k_BKSQ.shape[2], k_BKSQ.shape[3], v_BKSV.shape[3]
    if capacity * max(width, v_width) > MAX_ELEMENTS:
        return f"{capacity} rows of {max(width, v_width)}, of which a head may hold {MAX_ELEMENTS} elements"
    if width > WIDEST_KEY or v_width > WIDEST_VALUE:
        return f"keys of width {width} and values of width {v_width}, of at most {WIDEST_KEY} and {WIDEST_VALUE}"
    if not all(_is_wide_power(columns) for columns in (low_columns(width), width - low_columns(width))):
        return f"keys of width {width}, not the sum of two powers of two from {NARROWEST} on"
    if not _is_wide_power(v_width):
        return f"values of width {v_width}, not a power of two from {NARROWEST} on"
    return None


def low_columns(width: int) -> int:
    """How many columns of keys the first of two products takes: the largest power of two that leaves any."""
    return 1 << (width - 1).bit_length() - 1 if width > 1 else 0


def _is_wide_power(width: int) -> bool:
    return width >= NARROWEST and width.bit_count() == 1


def attend_long(
    q_BTHQ: Float[Array, "B T H Q"],
    k_BKSQ: Float[Array, "B K S Q"],
    v_BKSV: Float[Array, "B K S V"],
    query_BT: Int[Array, "B T"],
    sink_H: Float[Array, "H"] | None,
) -> Float[Array, "B T H V"]:
    """`api.attend_long`."""
    from pallas_kernels.attention import triton_kernels

    batch, tokens, heads, width = q_BTHQ.shape
    kv_heads, capacity, v_width = v_BKSV.shape[1:]
    group = heads // kv_heads
    tiles = batch * kv_heads * -(-tokens * group // ROWS)
    splits = max(1, min(PROGRAMS // tiles, -(-capacity // KEYS)))
    constants = {"T": tokens, "K": kv_heads, "G": group, "V": v_width, "SPLITS": splits}
    partial = jax.ShapeDtypeStruct((splits, batch, kv_heads, tokens, group), jnp.float32)
    partials = triton_call.call(
        triton_kernels.attend_split,
        q_BTHQ,
        k_BKSQ,
        v_BKSV,
        query_BT.astype(jnp.int32),
        out=(partial.update(shape=(*partial.shape, v_width)), partial, partial),
        grid=(tiles, splits),
        warps=8,
        stages=SMALL_STAGES if capability() in SMALL else STAGES,
        S=capacity,
        Q=width,
        LOW=low_columns(width),
        ROWS=ROWS,
        KEYS=KEYS,
        SCALE=width**-0.5 * math.log2(math.e),
        **constants,
    )
    sink_H = jnp.full(heads, -jnp.inf) if sink_H is None else sink_H.astype(jnp.float32) * math.log2(math.e)
    return triton_call.call(
        triton_kernels.merge,
        *partials,
        sink_H,
        out=jax.ShapeDtypeStruct((batch, tokens, heads, v_width), v_BKSV.dtype),
        grid=(batch * tokens * heads,),
        AT_ONCE=SPLITS_AT_ONCE,
        **constants,
    )
