"""The layouts of slots are the given bits in another order, and their registers are operands of the tensor core."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.decode_step.hopper import weights
from pallas_kernels.decode_step.hopper.config import PAGE_GAP, SLOT_WORDS, Columns, Inputs, Matrix

MATRICES = [
    Matrix(rows, cols, format)
    for format in ("mxfp4", "fp8", "bf16")
    for rows, cols in ((32, 1536), (48, 2048), (16, 512))
]


def random_weights(matrix: Matrix, rows: int, cols: int, stack: tuple[int, ...] = (2,)) -> tuple:
    """All bit patterns, and scales if the format has any."""
    rng = np.random.default_rng(rows + cols)
    if matrix.format == "bf16":
        return rng.integers(0, 65536, (*stack, rows, cols), np.uint16).view(ml_dtypes.bfloat16), None
    if matrix.format == "fp8":
        scales = rng.standard_normal((*stack, rows, cols // 64)).astype(np.float32)
        return rng.integers(0, 256, (*stack, rows, cols), np.uint8), scales
    return tuple(rng.integers(0, 256, (*stack, rows, cols // part), np.uint8) for part in (2, 32))


def as_bits(x):
    return None if x is None else np.ascontiguousarray(x).view(np.uint8)


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_the_layout_is_a_bijection(matrix):
    """Every bit of codes and scales comes back, and whole slots hold nothing else."""
    given = random_weights(matrix, matrix.rows, matrix.cols)
    words = weights.pack(matrix, *given)
    assert words.dtype == np.int32
    assert words.shape == (2, matrix.row_blocks, matrix.columns.chunks, matrix.slot_words)
    assert matrix.slot_words <= SLOT_WORDS
    assert words.nbytes == sum(x.nbytes for x in given if x is not None)
    for before, after in zip(given, weights.unpack(matrix, words)):
        np.testing.assert_array_equal(as_bits(before), as_bits(after))
    np.testing.assert_array_equal(weights.pack(matrix, *weights.unpack(matrix, words)), words)


@pytest.mark.parametrize("features", [128, 256, 768])
def test_the_layout_of_down_is_a_bijection(features):
    """A row block of an expert is one run of words."""
    rng = np.random.default_rng(features)
    codes, scales = (rng.integers(0, 256, (3, 48, features // part), np.uint8) for part in (2, 32))
    words = weights.pack_down(codes, scales)
    assert words.shape == (3, 3, 2 * features + features // 8) and words.dtype == np.int32
    for before, after in zip((codes, scales), weights.unpack_down(words)):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("format", ["mxfp4", "fp8", "bf16"])
def test_padding_is_zeros(format):
    """Rows up to 16 and columns up to the matrix' are zeros with a scale of one; what was given is unharmed."""
    matrix = Matrix(24, 1024, format)
    given = random_weights(matrix, 24, 896, ())
    found, scales = weights.unpack(matrix, weights.pack(matrix, *given))
    given_cols = given[0].shape[-1]
    assert found.shape == (32, given_cols * 1024 // 896)
    np.testing.assert_array_equal(as_bits(found[:24, :given_cols]), as_bits(given[0]))
    assert not as_bits(found[24:]).any() and not as_bits(found[:, given_cols:]).any()
    if scales is not None:
        one, per = (127, 32) if format == "mxfp4" else (1, 64)
        np.testing.assert_array_equal(scales[:24, : 896 // per], given[1])
        assert (scales[24:] == one).all() and (scales[:, 896 // per :] == one).all()


@pytest.mark.parametrize("format", ["mxfp4", "fp8", "bf16"])
def test_devices_rearrange_as_the_host_does(format):
    """JAX and NumPy give the same words and the same bits back; e4m3 is taken as numbers or as codes."""
    matrix = Matrix(16, 512, format)
    given = random_weights(matrix, 16, 512, ())
    words = weights.pack(matrix, *given)
    typed = given[0].view(ml_dtypes.float8_e4m3fn) if format == "fp8" else given[0]
    placed = [None if x is None else jnp.asarray(x) for x in (typed, given[1])]
    on_device = jax.jit(lambda *given: weights.pack(matrix, *given))(*placed)
    np.testing.assert_array_equal(words, on_device)
    back = jax.jit(lambda words: weights.unpack(matrix, words))(on_device)
    for before, after in zip(given, back):
        np.testing.assert_array_equal(as_bits(before), None if after is None else as_bits(np.asarray(after)))


def test_a_word_of_bf16_is_a_register_of_the_operand():
    """Lane 4g + t, register 2p + h of instruction s of a block of 32 is row g + 8h, columns 8t + 4s + 2p."""
    matrix = Matrix(16, 1536, "bf16")
    numbers = np.arange(16 * 1536, dtype=np.uint16).reshape(16, 1536)
    words = weights.pack(matrix, numbers.view(ml_dtypes.bfloat16)).view(np.uint32)
    assert words.shape == (1, 4, 3072)
    for chunk, warp, block, s, lane, register in ((0, 0, 0, 0, 0, 0), (3, 2, 1, 1, 13, 2), (1, 3, 2, 0, 31, 3)):
        word = words[0, chunk, warp * 768 + (block * 2 + s) * 128 + lane * 4 + register]
        row = lane // 4 + 8 * (register % 2)
        column = chunk * 384 + warp * 96 + block * 32 + lane % 4 * 8 + s * 4 + register // 2 * 2
        assert (word & 65535, word >> 16) == (numbers[row, column], numbers[row, column + 1])


@pytest.mark.parametrize("cols", [512, 1024, 2048, 6144])
def test_inputs_lie_as_pages_have_them(cols):
    """Each pair of columns of each token at a word of its own, where a page of its part has it; the gaps are free."""
    inputs = Inputs(Columns(cols, 1), 8)
    token, pair = np.mgrid[:8, : cols // 2]
    words = np.full(inputs.words, -1)
    words[inputs.place(token, 2 * pair)] = token * cols + pair
    pages = words.reshape(-1, 8, inputs.token_words)
    np.testing.assert_array_equal(pages[:, :, :-PAGE_GAP].swapaxes(0, 1).reshape(8, -1), token * cols + pair)
    assert (pages[:, :, -PAGE_GAP:] == -1).all()
