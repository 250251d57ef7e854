"""Block-FP8: exact decoding, ragged edges, saturation."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mimo_jax.layouts.packed import PackedMatrix
from mimo_jax.weights import BlockFp8Tensor, dequantize, dequantize_fp8, quantize_fp8
from mimo_jax.weights.fp8 import BLOCK, grid_shape


def by_formula(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """w[r, c] = f8[r, c] * s[r // 128, c // 128], written with index arrays."""
    rows, cols = np.indices(codes.shape)
    return codes.astype(np.float32) * scales[rows // BLOCK, cols // BLOCK]


def e4m3(byte: int) -> float:
    """The value of one E4M3 byte from the format's definition."""
    sign, exponent, mantissa = -1 if byte & 0x80 else 1, (byte >> 3) & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("backend", [np, jnp], ids=["numpy", "jax"])
def test_all_256_codes(backend):
    """Every E4M3 byte decodes to its defined value."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(2, 128)
    tensor = BlockFp8Tensor(backend.asarray(codes), backend.asarray([[2.0]], dtype=np.float32))
    expected = 2 * np.array([e4m3(byte) for byte in range(256)], np.float32).reshape(2, 128)
    np.testing.assert_array_equal(np.asarray(dequantize(tensor)), expected)


# 200 x 300 has a 2 x 3 grid that also divides the shape: readers that take shape / grid as the block get it wrong.
@pytest.mark.parametrize("shape", [(200, 300), (128, 128), (129, 127), (1, 1), (576, 384), (3392, 130)])
@pytest.mark.parametrize("backend", [np, jnp], ids=["numpy", "jax"])
def test_block_index_is_the_floor_of_position_over_128(shape, backend):
    """Ragged last blocks are short blocks: the scale of element (r, c) is the one at (r // 128, c // 128)."""
    rng = np.random.default_rng(0)
    codes = rng.uniform(-400, 400, shape).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, grid_shape(shape)).astype(np.float32)
    decoded = dequantize_fp8(BlockFp8Tensor(backend.asarray(codes), backend.asarray(scales)))
    np.testing.assert_array_equal(np.asarray(decoded), by_formula(codes, scales))


def test_published_grids():
    """A 576-row weight has 5 grid rows; each 3392-row chunk of the fused QKV has its own 27."""
    assert grid_shape((576, 7168)) == (5, 56)
    assert grid_shape((8, 3392, 6144)) == (8, 27, 48)


@pytest.mark.parametrize("backend", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("shape", [(200, 300), (2, 96, 130)])
def test_quantizing_reaches_the_largest_code_and_never_nan(shape, backend):
    """Each block's maximum lands on 448, nothing becomes NaN, and every error is within half a code step."""
    weights = (np.random.default_rng(1).standard_t(3, shape) * 30).astype(np.float32)
    tensor = quantize_fp8(backend.asarray(weights))
    assert tensor.shape == shape and tensor.scales.shape == grid_shape(shape)
    decoded = np.asarray(dequantize_fp8(tensor))
    assert np.isfinite(decoded).all()
    assert np.abs(np.asarray(tensor.codes).astype(np.float32)).max() == 448
    # E4M3 has 3 mantissa bits: relative error at most 2^-4, or half a subnormal step of the block's scale.
    step = np.asarray(tensor.scales).max() * 2.0**-9
    assert np.all(np.abs(decoded - weights) <= np.maximum(np.abs(weights) * 2.0**-4, step / 2) * 1.0001)


@pytest.mark.parametrize("backend", [np, jnp], ids=["numpy", "jax"])
def test_zero_and_tiny_blocks(backend):
    """An all-zero block has scale 1; a block of numbers too small for a normal scale still has no NaN."""
    weights = np.zeros((128, 384), np.float32)
    weights[0, 128] = 2e-38
    weights[0, 256] = 1e-44
    tensor = quantize_fp8(backend.asarray(weights))
    assert tensor.scales[0, 0] == 1
    assert np.isfinite(np.asarray(dequantize_fp8(tensor))).all()
    assert np.isfinite(np.asarray(tensor.codes).astype(np.float32)).all()


def test_same_numbers_as_compressed_tensors():
    """An independent dequantiser reads the same weights from the same codes and scales, ragged edges included."""
    torch = pytest.importorskip("torch", reason="the compressed-tensors reference needs torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize

    tensor = quantize_fp8(np.random.default_rng(2).standard_normal((200, 300)).astype(np.float32))
    codes = torch.from_numpy(tensor.codes.view(np.uint8)).view(torch.float8_e4m3fn)
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    expected = ct_dequantize(codes, torch.from_numpy(tensor.scales), args=args, dtype=torch.float32)
    np.testing.assert_array_equal(np.asarray(dequantize_fp8(tensor)), expected.numpy())


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("rows", [200, 128, 5])
def test_products_are_those_of_the_expanded_weights(lead, rows):
    """Scaling the sums of blocks equals multiplying expanded weights, to float32 rounding, ragged rows included."""
    rng = np.random.default_rng(1)
    weights = quantize_fp8(rng.normal(size=(*lead, rows, 384)).astype(np.float32))
    x = rng.normal(size=(2, 4, 384)).astype(np.float32)
    expected = np.einsum("btk,...nk->bt...n", x.astype(np.float64), dequantize_fp8(weights).astype(np.float64))
    matrix = PackedMatrix(BlockFp8Tensor(jnp.asarray(weights.codes), jnp.asarray(weights.scales)), ())
    found = matrix.multiply(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
