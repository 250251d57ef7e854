"""The op in plain JAX: what CPUs run, and what kernels must equal."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.backends import Shaped

BLOCK = 128  # rows, and columns, that share a scale


def unsupported(x: Shaped, codes: Shaped) -> None:
    """Nothing is."""


def fp8_matmul(
    x_TI: Float[Array, "T I"], codes_JOI: Float[Array, "J O I"], scales_Joi: Float[Array, "J o i"]
) -> Float[Array, "T J O"]:
    """`api.fp8_matmul`. Every block of 128 columns is multiplied as codes, and its sums are scaled.

    XLA on GPU fuses a plain conversion into its matrix product, but writes scaled weights to memory first.
    """
    chunks, rows, cols = codes_JOI.shape
    codes_JOib = codes_JOI.astype(x_TI.dtype).reshape(chunks, rows, cols // BLOCK, BLOCK)
    scales_JOi = jnp.repeat(scales_Joi, BLOCK, axis=1)[:, :rows]
    x_Tib = x_TI.reshape(-1, cols // BLOCK, BLOCK)
    sums_iTJO = jnp.einsum("tib,joib->itjo", x_Tib, codes_JOib, preferred_element_type=jnp.float32)
    return jnp.einsum("itjo,joi->tjo", sums_iTJO, scales_JOi)
