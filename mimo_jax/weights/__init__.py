"""Weights as files hold them: the table of parameters, and the tensors that are not plain arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mimo_jax.weights.fp8 import BlockFp8Tensor, dequantize_fp8, quantize_fp8
from mimo_jax.weights.mxfp4 import MxTensor, check_finite, dequantize_mx, fake_quantize, quantize_mx

Params = dict  # a parameter tree
StoredWeight = Array | np.ndarray | MxTensor | BlockFp8Tensor


def dequantize(weights: StoredWeight, dtype=jnp.float32) -> Float[Array | np.ndarray, "..."]:
    """Any stored weight as an array of `dtype`."""
    if isinstance(weights, MxTensor):
        return dequantize_mx(weights, dtype)
    if isinstance(weights, BlockFp8Tensor):
        return dequantize_fp8(weights, dtype)
    return weights.astype(dtype)


def expand(params: Params) -> Params:
    """Parameters of any file format as plain float32 arrays on the host."""
    # In numpy: eager JAX would compile a program for every shape.
    return jax.tree.map(
        lambda leaf: dequantize(jax.tree.map(np.asarray, leaf), np.float32),
        params,
        is_leaf=lambda node: not isinstance(node, dict),
    )


def encode(weights: StoredWeight, stored: str, dtype, label: str = "weights") -> StoredWeight:
    """As a file stores it ("mxfp4", "fp8", else an array of `dtype`): kept if it is, else quantised from float32.

    A value that has no code is a `UserError` that names `label` and the place.
    """
    container = {"mxfp4": MxTensor, "fp8": BlockFp8Tensor}.get(stored)
    if container is None:
        return dequantize(weights, dtype)
    if isinstance(weights, container):
        return weights
    dense = dequantize(weights, np.float32)
    if isinstance(dense, np.ndarray):
        check_finite(dense, label)
    return quantize_mx(dense, rule="even") if stored == "mxfp4" else quantize_fp8(dense)


__all__ = [
    "BlockFp8Tensor",
    "MxTensor",
    "Params",
    "StoredWeight",
    "dequantize",
    "dequantize_fp8",
    "dequantize_mx",
    "encode",
    "expand",
    "fake_quantize",
    "quantize_fp8",
    "quantize_mx",
]
