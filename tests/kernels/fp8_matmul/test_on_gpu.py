"""What no CPU can show: the Triton kernels' own arithmetic, on the device (`make gpu`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul.api import KERNELS
from pallas_kernels.fp8_matmul.shapes import DOWN, GATE, QKV, SMALL
from tests.kernels.fp8_matmul.samples import definition, relative_error, tokens_of, weights_of

pytestmark = pytest.mark.gpu
run = jax.jit(fp8_matmul, static_argnames="backend")


def draw(shape, tokens):
    """Tokens, codes and scales, or a skip that says why the kernels cannot run here."""
    codes, scales = weights_of(shape.chunks, shape.rows, shape.cols)
    x = tokens_of(tokens, shape.cols)
    if (reason := KERNELS.module("triton").unsupported(x, codes)) is not None:
        pytest.skip(reason)
    return x, codes, scales


@pytest.mark.parametrize("tokens", [1, 8, 11, 16, 40, 256])
@pytest.mark.parametrize("shape", [QKV, GATE, DOWN, SMALL], ids=["qkv", "gate", "down", "small"])
def test_the_op_is_its_definition(shape, tokens):
    """Decode and prefill: within 1e-5 of float64, and of the reference."""
    x, codes, scales = draw(shape, tokens)
    found = run(x, jnp.asarray(codes), jnp.asarray(scales), backend="triton")
    assert relative_error(found, definition(x, codes, scales)) < 1e-5
    reference = run(x, jnp.asarray(codes), jnp.asarray(scales), backend="reference")
    assert relative_error(found, np.asarray(reference, np.float64)) < 1e-5


@pytest.mark.parametrize("shape", [QKV, DOWN, SMALL], ids=["qkv", "down", "small"])
def test_bits_do_not_depend_on_the_block(shape):
    """A token's products: the same bits alone, in a block of 4, 8 and 16, and in every run."""
    x, *weights = draw(shape, 16)
    weights = [jnp.asarray(part) for part in weights]
    whole = np.asarray(run(x, *weights, backend="triton"))
    for first, last in ((0, 16), (0, 8), (8, 16), (4, 8), *((token, token + 1) for token in range(16))):
        part = run(x[first:last], *weights, backend="triton")
        np.testing.assert_array_equal(np.asarray(part), whole[first:last])
