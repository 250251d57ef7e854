"""Random FP8 weights and the op's definition in float64, for the kernels' tests."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

FINITE = np.array([byte for byte in range(256) if byte & 127 != 127], np.uint8).view(ml_dtypes.float8_e4m3fn)


def weights_of(chunks: int, rows: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes, each of the finite ones among them, and scales over six orders of magnitude of two."""
    rng = np.random.default_rng(seed)
    picks = np.arange(chunks * rows * cols) % FINITE.size
    codes = FINITE[rng.permutation(picks)].reshape(chunks, rows, cols)
    grid = chunks, -(-rows // 128), cols // 128
    return codes, np.exp2(rng.uniform(-9, -3, grid)).astype(np.float32)


def tokens_of(count: int, cols: int, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((count, cols)), dtype)


def definition(x: jax.Array, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Products [T, J, O] in float64, every code times the scale of its block."""
    chunk, row, col = np.indices(codes.shape, sparse=True)
    weights = codes.astype(np.float64) * scales.astype(np.float64)[chunk, row // 128, col // 128]
    return np.einsum("ti,joi->tjo", np.asarray(x, np.float64), weights)


def relative_error(found, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))
