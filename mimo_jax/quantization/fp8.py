"""BlockFp8Tensor: E4M3 weights with one float32 scale per 128 x 128 block, ragged edges included."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import TypeGuard

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.fp8_matmul import BLOCK, fp8_matmul

E4M3_MAX = 448.0
FEW_ROWS = 16  # the sums of 8 rows take an eighth of the bytes of expanded weights; those of 64 rows take as many


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockFp8Tensor:
    """Weights [..., N, K]; element (n, k) is codes[n, k] * scales[n // 128, k // 128].

    The block index is n // 128, never a ratio of shapes: the last block of a row or column may be short. A fused QKV
    is stored as [chunk, rows, K] with one scale grid per chunk, which is how the published files lay it out.
    """

    codes: Array | np.ndarray  # float8_e4m3fn [..., N, K]
    scales: Float[Array | np.ndarray, "*N/128 K/128"]

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


def quantize_fp8(weights: Float[Array | np.ndarray, "*N K"]) -> BlockFp8Tensor:
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


def suits_fp8(weights: object, x: Float[Array, "*B K"]) -> TypeGuard[BlockFp8Tensor]:
    """Whether `multiply_fp8` can multiply by these, and moves fewer bytes than expanding the weights."""
    if not isinstance(weights, BlockFp8Tensor):
        return False
    return weights.shape[-1] % BLOCK == 0 and x.size <= FEW_ROWS * x.shape[-1]


def multiply_fp8(x: Float[Array, "*B K"], weights: BlockFp8Tensor, backend: str = "reference") -> Float[Array, "*B N"]:
    """x W^T for weights [..., N, K], accumulated in float32, as [..., N] behind the leading axes of `x`.

    `backend` is one of `pallas_kernels.fp8_matmul.BACKENDS`. Needs K in whole blocks.
    """
    codes_GNK, scales_Gnk = (
        jnp.asarray(part).reshape(-1, *part.shape[-2:]) for part in (weights.codes, weights.scales)
    )
    y_TGN = fp8_matmul(x.reshape(-1, x.shape[-1]), codes_GNK, scales_Gnk, backend=backend)
    return y_TGN.reshape(*x.shape[:-1], *weights.shape[:-1])


def dequantize_fp8(weights: BlockFp8Tensor, dtype=jnp.float32) -> Float[Array, "*N K"]:
    xp = np if isinstance(weights.codes, np.ndarray) else jnp
    return (weights.codes.astype(np.float32) * _spread(xp, weights.scales, weights.shape)).astype(dtype)
