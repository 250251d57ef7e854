"""Packed weights: MXFP4 and block-FP8 tensors, and the one function that reads any weight as numbers."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from mimo_jax.quantization.fp8 import BlockFp8Tensor, dequantize_fp8, quantize_fp8
from mimo_jax.quantization.mx import MxTensor, dequantize_mx, fake_quantize, quantize_mx

Weight = Array | MxTensor | BlockFp8Tensor


def dequantize(weights: Weight, dtype=jnp.float32) -> Float[Array, "..."]:
    """Any stored weight as an array of `dtype`."""
    if isinstance(weights, MxTensor):
        return dequantize_mx(weights, dtype)
    if isinstance(weights, BlockFp8Tensor):
        return dequantize_fp8(weights, dtype)
    return weights.astype(dtype)


__all__ = [
    "BlockFp8Tensor",
    "MxTensor",
    "Weight",
    "dequantize",
    "dequantize_fp8",
    "dequantize_mx",
    "fake_quantize",
    "quantize_fp8",
    "quantize_mx",
]
