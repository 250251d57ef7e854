"""The op: tokens, E4M3 codes and the scales of their blocks in; products in float32 out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.backends import Backends, Shaped
from pallas_kernels.fp8_matmul.reference import BLOCK

KERNELS = Backends("pallas_kernels.fp8_matmul", ("triton", "reference"))
BACKENDS = KERNELS.names


def fp8_matmul(
    x_TI: Float[Array, "T I"],
    codes_JOI: Float[Array, "J O I"],
    scales_Joi: Float[Array, "J o i"],
    *,
    backend: str | None = None,
) -> Float[Array, "T J O"]:
    """y[t, j, r] = sum_c x[t, c] * codes[j, r, c] * scales[j, r // 128, c // 128], summed in float32.

    Every chunk j has a scale grid of its own, whose last row of blocks may be short; columns come in whole blocks.

    `backend` is one of `BACKENDS`; by default the fastest that serves the call on this device. A named one that does
    not serve it raises NotImplementedError, and never gives way to another.
    """
    _check(x_TI, codes_JOI, scales_Joi)
    module = KERNELS.serving(backend, x_TI, codes_JOI)
    return module.fp8_matmul(x_TI, codes_JOI, scales_Joi)


def choose(x: Shaped, codes: Shaped) -> str:
    """The fastest backend that serves the call on JAX's default device; any axes may lead tokens and codes."""
    return KERNELS.choose(x, codes)


def _check(x_TI: Array, codes_JOI: Array, scales_Joi: Array) -> None:
    """Raises ValueError, naming the value, where the arguments do not fit each other."""
    if codes_JOI.ndim != 3 or codes_JOI.shape[2] % BLOCK:
        raise ValueError(f"codes of shape {codes_JOI.shape}; [chunks, rows, columns in blocks of {BLOCK}] is needed")
    if codes_JOI.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"codes of dtype {codes_JOI.dtype}, not float8_e4m3fn")
    chunks, rows, cols = codes_JOI.shape
    if x_TI.ndim != 2 or x_TI.shape[1] != cols:
        raise ValueError(f"tokens of shape {x_TI.shape}; the weights read rows of {cols}")
    if not jnp.issubdtype(x_TI.dtype, jnp.floating):
        raise ValueError(f"tokens of dtype {x_TI.dtype}; a floating one is needed")
    grid = (chunks, -(-rows // BLOCK), cols // BLOCK)
    if scales_Joi.shape != grid or scales_Joi.dtype != jnp.float32:
        raise ValueError(f"scales {scales_Joi.dtype} {scales_Joi.shape}; float32 {grid} is needed")
