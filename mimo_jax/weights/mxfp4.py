"""MxTensor: an MXFP4 weight that stays packed on disk, in device memory and into the matmul."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mimo_jax.errors import UserError
from pallas_kernels import mxfp4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MxTensor:
    """Weights [..., O, I] in MXFP4, blocks of 32 along I (the contraction axis)."""

    codes: UInt8[Array | np.ndarray, "*O I/2"]
    scales: UInt8[Array | np.ndarray, "*O I/32"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    def __getitem__(self, index) -> MxTensor:
        """Selects along the leading axes only."""
        return MxTensor(self.codes[index], self.scales[index])


def quantize_mx(weights: Float[Array | np.ndarray, "*O I"], rule: str = "even") -> MxTensor:
    """Rounds to MXFP4 under the named scale rule (see `pallas_kernels.mxfp4`). The input must be finite."""
    codes, scales = mxfp4.quantize(weights, rule)
    return MxTensor(mxfp4.pack(codes), scales)


def dequantize_mx(weights: MxTensor, dtype=jnp.float32) -> Float[Array, "*O I"]:
    """The exact values in float32, then rounded to `dtype` (bf16 is exact too for every normal value)."""
    return mxfp4.decode(mxfp4.unpack(weights.codes), weights.scales).astype(dtype)


def fake_quantize(weights: Float[Array, "*O I"], rule: str = "even") -> Float[Array, "*O I"]:
    """What the exported bytes will decode to, in the dtype of `weights`; the gradient passes straight through.

    No clipping mask: under `even` one block in eight has a saturated maximum, and a mask would freeze just those.
    """
    quantized = mxfp4.decode(*mxfp4.quantize(weights, rule)).astype(weights.dtype)
    return weights + jax.lax.stop_gradient(quantized - weights)


def check_finite(weights: np.ndarray, name: str) -> None:
    """Raises with the tensor's name and the first bad index when `weights` holds NaN or Inf."""
    bad = ~np.isfinite(np.asarray(weights, np.float32))
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise UserError(f"{name}: {weights[index]} at index {list(index)}; MXFP4 has no code for NaN or Inf")


def check_scales(scales: np.ndarray, name: str) -> None:
    """Raises with the tensor's name and the first bad index when `scales` holds 0xFF, the E8M0 NaN."""
    bad = scales == mxfp4.NAN_SCALE
    if bad.any():
        raise UserError(f"{name}: scale byte 0xFF (NaN) at index {[int(i) for i in np.argwhere(bad)[0]]}")
