"""The op in plain JAX: what CPUs run, and what kernels must equal."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK = 128  # rows, and columns, that share a scale


def unsupported(x: Array, codes: Array | np.ndarray) -> None:
    """Nothing is."""


def fp8_matmul(
    x_TK: Float[Array, "T K"], codes_GNK: Float[Array, "G N K"], scales_Gnk: Float[Array, "G N/128 K/128"]
) -> Float[Array, "T G N"]:
    """`api.fp8_matmul`. Every block of 128 columns is multiplied as codes, and its sums are scaled.

    XLA on GPU fuses a plain conversion into its matrix product, but writes scaled weights to memory first.
    """
    chunks, rows, cols = codes_GNK.shape
    codes_GNkb = codes_GNK.astype(x_TK.dtype).reshape(chunks, rows, cols // BLOCK, BLOCK)
    scales_GNk = jnp.repeat(scales_Gnk, BLOCK, axis=1)[:, :rows]
    x_Tkb = x_TK.reshape(-1, cols // BLOCK, BLOCK)
    sums_kTGN = jnp.einsum("tkb,gnkb->ktgn", x_Tkb, codes_GNkb, preferred_element_type=jnp.float32)
    return jnp.einsum("ktgn,gnk->tgn", sums_kTGN, scales_GNk)
