"""BlockFp8Tensor: E4M3 weights with one float32 scale per 128 x 128 block, ragged edges included."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.fp8_matmul import BLOCK

E4M3_MAX = 448.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockFp8Tensor:
    """Weights [..., O, I]; element (o, i) is codes[o, i] * scales[o // 128, i // 128].

    The block index is o // 128, never a ratio of shapes: the last block of a row or column may be short. A fused QKV
    is stored as [chunk, rows, I] with one scale grid per chunk, which is how the published files lay it out.
    """

    codes: Array | np.ndarray  # float8_e4m3fn [..., O, I]
    scales: Float[Array | np.ndarray, "*o i"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def __getitem__(self, index) -> BlockFp8Tensor:
        """Selects along the leading axes only."""
        return BlockFp8Tensor(self.codes[index], self.scales[index])


def grid_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The scale grid's shape for weights of `shape`."""
    *leading, rows, cols = shape
    return (*leading, -(-rows // BLOCK), -(-cols // BLOCK))


def _spread(xp: ModuleType, scales, shape: tuple[int, ...]):
    rows, cols = shape[-2:]
    wide = xp.repeat(xp.repeat(scales, BLOCK, axis=-2), BLOCK, axis=-1)
    return wide[..., :rows, :cols]


def quantize_fp8(weights: Float[Array | np.ndarray, "*O I"]) -> BlockFp8Tensor:
    """Scale = block maximum / 448, never subnormal; 1 for an all-zero block. Clips: a bare cast overflows to NaN."""
    xp = np if isinstance(weights, np.ndarray) else jnp
    *leading, rows, cols = weights.shape
    *_, grid_rows, grid_cols = grid_shape(weights.shape)
    padding = [(0, 0)] * len(leading) + [(0, grid_rows * BLOCK - rows), (0, grid_cols * BLOCK - cols)]
    blocks = xp.pad(weights.astype(np.float32), padding).reshape(*leading, grid_rows, BLOCK, grid_cols, BLOCK)
    amax = xp.max(xp.abs(blocks), axis=(-3, -1))
    scales = xp.maximum(amax / np.float32(E4M3_MAX), np.finfo(np.float32).tiny)
    scales = xp.where(amax > 0, scales, np.float32(1)).astype(np.float32)
    scaled = weights.astype(np.float32) / _spread(xp, scales, weights.shape)
    return BlockFp8Tensor(xp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn), scales)


def dequantize_fp8(weights: BlockFp8Tensor, dtype=jnp.float32) -> Float[Array, "*O I"]:
    xp = np if isinstance(weights.codes, np.ndarray) else jnp
    return (weights.codes.astype(np.float32) * _spread(xp, weights.scales, weights.shape)).astype(dtype)
