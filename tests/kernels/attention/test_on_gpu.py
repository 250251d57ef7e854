"""What no CPU can show: the Triton kernel's own arithmetic, on the device (`make gpu`)."""

import jax
import numpy as np
import pytest

from pallas_kernels.attention import attend_long, triton
from tests.kernels.attention.samples import definition, error, in_bf16, inputs

pytestmark = pytest.mark.gpu
PRO = (192, 128)
run = jax.jit(attend_long, static_argnames="backend")


def sample(shape, lengths, tokens, capacity):
    """As the kernel takes it; a skip that says why it cannot run here."""
    arrays = in_bf16(inputs(shape, lengths, tokens, capacity, PRO))
    if (reason := triton.unsupported(*arrays[:3])) is not None:
        pytest.skip(reason)
    return arrays


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 2, 3)])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (8, 8), (8, 65), (8, 1000), (40, 777), (256, 3000)])
def test_the_op_is_its_definition(shape, tokens, length):
    """Within the rounding of weights and of results to bfloat16, from a cache with NaN after the last token."""
    *arrays, sink = sample(shape, [length] * shape[0], tokens, 4000)
    for one in (sink, None):
        found = run(*arrays, one, backend="triton")
        assert error(found, definition(*map(np.asarray, arrays), one)) < 3e-2


@pytest.mark.parametrize(("tokens", "length"), [(8, 100_000), (256, 100_000)])
def test_a_long_cache_as_the_reference(tokens, length):
    """Real sizes: the reference's numbers, for rows of a batch of different lengths."""
    arrays = sample((2, 1, 16), [length, length // 3], tokens, 1 << 17)
    arrays[1:3] = [np.nan_to_num(array) for array in arrays[1:3]]  # the reference reads chunks to their end
    found, wanted = (run(*arrays, backend=backend) for backend in ("triton", "reference"))
    assert error(found, np.asarray(wanted, np.float64)) < 2e-2


def test_bits_do_not_depend_on_the_block():
    """A token's result: the same bits in a block of 1, 4 and 8, in a cache of another capacity, and in every run."""
    q, k, v, query, sink = sample((1, 1, 16), [20_000], 8, 1 << 15)
    whole = np.asarray(run(q, k, v, query, sink, backend="triton"))
    for first, last in ((0, 8), (0, 4), (4, 8), *((token, token + 1) for token in range(8))):
        block = slice(first, last)
        part = run(q[:, block], k[:, :, :24_000], v[:, :, :24_000], query[:, block], sink, backend="triton")
        np.testing.assert_array_equal(np.asarray(part), whole[:, block])
