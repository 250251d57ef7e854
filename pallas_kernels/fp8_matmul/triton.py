"""The products through Triton, for GPUs from Ada to Blackwell: codes become bf16 in registers, just before a dot."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import triton_call
from pallas_kernels.backends import Shaped
from pallas_kernels.devices import capability
from pallas_kernels.fp8_matmul.reference import BLOCK

OLDEST = 89  # compute capability, ten times: the first to convert E4M3
DECODE_TOKENS = 16  # up to here, reading the codes is what takes the time
DECODE_ROWS, DECODE_BLOCKS = 16, 8  # of a program, and of its step; the 3392 rows of Pro at TP8 are 212 programs
PREFILL_ROWS, PREFILL_TOKENS = 64, 64
LARGEST = 2**31  # offsets have 32 bits


def unsupported(x: Shaped, codes: Shaped) -> str | None:
    """What keeps this backend from serving a call."""
    if (reason := triton_call.missing()) is not None:
        return reason
    if (capability() or 0) < OLDEST:
        return f"compute capability {(capability() or 0) / 10}; E4M3 came with {OLDEST / 10}"
    if x.dtype != jnp.bfloat16:
        return f"tokens of dtype {x.dtype}, not bfloat16"
    cols = codes.shape[-1]
    largest = max(x.size, codes.size, x.size // cols * (codes.size // cols))
    return f"an array of {largest} elements; {LARGEST} are too many" if largest >= LARGEST else None


def fp8_matmul(
    x_TI: Float[Array, "T I"], codes_JOI: Float[Array, "J O I"], scales_Joi: Float[Array, "J o i"]
) -> Float[Array, "T J O"]:
    """`api.fp8_matmul`."""
    from pallas_kernels.fp8_matmul import triton_kernels

    tokens, (chunks, rows, cols) = x_TI.shape[0], codes_JOI.shape
    out = jax.ShapeDtypeStruct((tokens, chunks, rows), jnp.float32)
    sizes = {"T": tokens, "J": chunks, "OUT": rows, "IN": cols, "BLOCK": BLOCK}
    call = functools.partial(triton_call.call, out=out, **sizes)
    if tokens > DECODE_TOKENS:
        grid = (-(-tokens // PREFILL_TOKENS), -(-rows // PREFILL_ROWS), chunks)
        tile = {"ROWS": PREFILL_ROWS, "TOKENS": PREFILL_TOKENS}
        return call(triton_kernels.many, x_TI, codes_JOI, scales_Joi, grid=grid, stages=4, **tile)
    # Tensor cores take eight columns or sixteen; the bits of a token are the same in both.
    columns, stages = (8, 4) if tokens <= 8 else (16, 3)
    steps = -(-cols // (DECODE_BLOCKS * BLOCK))
    return call(
        triton_kernels.few,
        x_TI,
        codes_JOI,
        scales_Joi,
        grid=(-(-rows // DECODE_ROWS), chunks),
        warps=DECODE_BLOCKS,
        stages=min(stages, steps + 1),
        ROWS=DECODE_ROWS,
        TOKENS=columns,
        BLOCKS=DECODE_BLOCKS,
    )
