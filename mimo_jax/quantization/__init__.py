"""Weights that are not plain arrays: MXFP4 and block-FP8 tensors, turned matrices; what reads any as numbers."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from mimo_jax.quantization.fp8 import BlockFp8Tensor, dequantize_fp8, multiply_fp8, quantize_fp8, suits_fp8
from mimo_jax.quantization.mx import MxTensor, dequantize_mx, fake_quantize, quantize_mx
from mimo_jax.quantization.turned import TurnedMatrix, turn

Weight = Array | MxTensor | BlockFp8Tensor | TurnedMatrix


def dequantize(weights: Weight, dtype=jnp.float32) -> Float[Array, "..."]:
    """Any stored weight as an array of `dtype`."""
    if isinstance(weights, MxTensor):
        return dequantize_mx(weights, dtype)
    if isinstance(weights, BlockFp8Tensor):
        return dequantize_fp8(weights, dtype)
    if isinstance(weights, TurnedMatrix):
        return weights.matrix.T.astype(dtype)
    return weights.astype(dtype)


__all__ = [
    "BlockFp8Tensor",
    "MxTensor",
    "TurnedMatrix",
    "Weight",
    "dequantize",
    "dequantize_fp8",
    "dequantize_mx",
    "fake_quantize",
    "multiply_fp8",
    "quantize_fp8",
    "quantize_mx",
    "suits_fp8",
    "turn",
]
