"""Bit-exactness against independent quantisers: torchao and compressed-tensors."""

import numpy as np
import pytest

from pallas_kernels import mxfp4

SMALLEST_SCALE = 1  # torchao clamps scale byte 0 (below 2**-126) to 2**-126; such blocks hold only zeros or subnormals


def special_blocks() -> np.ndarray:
    """Blocks where quantisers differ: ties, rule boundaries, every magnitude, single spikes, zeros."""
    ties = np.array([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    up, down = np.nextafter(ties[1:], np.float32(9)), np.nextafter(ties[1:], np.float32(0))
    tie_block = np.concatenate([ties, -ties, up, down, [0, 0]]).astype(np.float32)
    blocks = [np.ldexp(tie_block, exponent) for exponent in range(-110, 120, 10)]
    ramp = np.linspace(-1, 1, 32, dtype=np.float32)
    one, two = np.float32(1), np.float32(2)
    mantissas = [1, 1.25, np.nextafter(np.float32(1.5), one), 1.5, np.nextafter(np.float32(1.5), two), 1.5625]
    mantissas += [np.nextafter(np.float32(1.75), one), 1.75, np.nextafter(np.float32(1.75), two), 1.99999988]
    for mantissa in mantissas:
        for exponent in (-100, -40, -7, -1, 0, 1, 2, 10, 60, 120):
            block = ramp * np.float32(mantissa)
            block[[0, 31]] = -mantissa, mantissa / 3
            blocks.append(np.ldexp(block, exponent))
    spike = np.zeros((4, 32), np.float32)
    spike[np.arange(4), [0, 7, 16, 31]] = 1e-6, -3.5, 448, -1e30
    return np.concatenate([np.stack(blocks), spike, np.zeros((1, 32))]).astype(np.float32)


def random_blocks(count: int = 256) -> np.ndarray:
    """Normal and heavy-tailed weights at many magnitudes; half of them exact in bf16, which hits ties often."""
    rng = np.random.default_rng(7)
    blocks = rng.standard_t(4, (count, 32)) * np.exp(rng.uniform(-12, 6, (count, 1)))
    blocks = blocks.astype(np.float32)
    blocks[::2] = (blocks[::2].view(np.uint32) & 0xFFFF0000).view(np.float32)
    return blocks


@pytest.fixture(scope="module")
def blocks() -> np.ndarray:
    found = np.concatenate([special_blocks(), random_blocks()])
    assert len(found) >= 300
    return found


def without_negative_zero(packed: np.ndarray) -> np.ndarray:
    codes = mxfp4.unpack(packed)
    return np.where(codes == 8, 0, codes)


def torchao_bytes(blocks: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    torch = pytest.importorskip("torch", reason="the torchao reference needs torch")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    modes = config.ScaleCalculationMode
    scales, packed = to_mx(torch.from_numpy(blocks), torch.float4_e2m1fn_x2, 32, getattr(modes, mode))
    return without_negative_zero(packed.view(torch.uint8).numpy()), scales.view(torch.uint8).numpy()


@pytest.mark.parametrize("rule, mode", [("even", "EVEN"), ("floor", "FLOOR"), ("ceil6", "RCEIL")])
def test_same_bytes_as_torchao(blocks, rule, mode):
    """Every rule writes torchao's bytes on special and random blocks; only the sign of zero is not compared."""
    expected_codes, expected_scales = torchao_bytes(blocks, mode)
    codes, scales = mxfp4.quantize(blocks, rule)
    kept = np.ones(len(blocks), bool)
    if mode == "RCEIL":
        # torchao divides by 6 and takes log2 in float32: inexact where amax / 6 is within an ulp above a power of two.
        amax = np.abs(blocks).max(axis=1)
        mantissa = amax.view(np.int32) & 0x7FFFFF
        kept = np.abs(mantissa - 0x400000) > 1
        kept |= amax == 0
    assert kept.sum() >= 300
    np.testing.assert_array_equal(scales[kept], expected_scales.reshape(scales.shape)[kept])
    np.testing.assert_array_equal(codes[kept], expected_codes[kept])


def test_same_bytes_as_compressed_tensors(blocks):
    """The default rule writes compressed-tensors' mxfp4-pack-quantized bytes."""
    torch = pytest.importorskip("torch", reason="the compressed-tensors reference needs torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    nonzero = blocks[np.abs(blocks).max(axis=1) > 0]  # it scales an all-zero block by a float epsilon instead
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8
    )
    weight = torch.from_numpy(nonzero)
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    scale, _ = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale}
    state = MXFP4PackedCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    codes, scales = mxfp4.quantize(nonzero)
    np.testing.assert_array_equal(scales, state["weight_scale"].numpy().reshape(scales.shape))
    np.testing.assert_array_equal(codes, without_negative_zero(state["weight_packed"].numpy()))
