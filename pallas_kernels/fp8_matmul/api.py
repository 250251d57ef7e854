"""The op: tokens, E4M3 codes and the scales of their blocks in; products in float32 out."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.backends import Backends
from pallas_kernels.fp8_matmul.reference import BLOCK

KERNELS = Backends("pallas_kernels.fp8_matmul", ("triton", "reference"))
BACKENDS = KERNELS.names


def fp8_matmul(
    x_TK: Float[Array, "T K"],
    codes_GNK: Float[Array, "G N K"],
    scales_Gnk: Float[Array, "G N/128 K/128"],
    *,
    backend: str | None = None,
) -> Float[Array, "T G N"]:
    """y[t, g, n] = sum_k x[t, k] * codes[g, n, k] * scales[g, n // 128, k // 128], summed in float32.

    Every chunk g has a scale grid of its own, whose last row of blocks may be short; columns come in whole blocks.

    `backend` is one of `BACKENDS`; by default the fastest that serves the call on this device. A named one that does
    not serve it raises NotImplementedError, and never gives way to another.
    """
    _check(x_TK, codes_GNK, scales_Gnk)
    module = KERNELS.serving(backend, x_TK, codes_GNK)
    return module.fp8_matmul(x_TK, codes_GNK, scales_Gnk)


def choose(x: Array, codes: Array | np.ndarray) -> str:
    """The fastest backend that serves the call on JAX's default device; any axes may lead tokens and codes."""
    return KERNELS.choose(x, codes)


def _check(x_TK: Array, codes_GNK: Array, scales_Gnk: Array) -> None:
    """Raises ValueError, naming the value, where the arguments do not fit each other."""
    if codes_GNK.ndim != 3 or codes_GNK.shape[2] % BLOCK:
        raise ValueError(f"codes of shape {codes_GNK.shape}; [chunks, rows, columns in blocks of {BLOCK}] is needed")
    if codes_GNK.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"codes of dtype {codes_GNK.dtype}, not float8_e4m3fn")
    chunks, rows, cols = codes_GNK.shape
    if x_TK.ndim != 2 or x_TK.shape[1] != cols:
        raise ValueError(f"tokens of shape {x_TK.shape}; the weights read rows of {cols}")
    if not jnp.issubdtype(x_TK.dtype, jnp.floating):
        raise ValueError(f"tokens of dtype {x_TK.dtype}; a floating one is needed")
    grid = (chunks, -(-rows // BLOCK), cols // BLOCK)
    if scales_Gnk.shape != grid or scales_Gnk.dtype != jnp.float32:
        raise ValueError(f"scales {scales_Gnk.dtype} {scales_Gnk.shape}; float32 {grid} is needed")
