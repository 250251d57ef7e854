"""What no CPU can show: each GPU backend's own arithmetic, on the device (`make gpu`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_matmul import expert_ffn, to_hopper
from pallas_kernels.expert_matmul.api import KERNELS
from tests.kernels.expert_matmul.samples import (
    CASES,
    definition,
    on_device,
    packed_experts,
    relative_error,
    routing,
    tokens_of,
    weights_of,
)

pytestmark = pytest.mark.gpu
SIZES = [(512, 256), (4096, 256), (6144, 512)]
run = jax.jit(expert_ffn, static_argnames="backend")


def stacks(backend: str, hidden: int, features: int):
    """Experts in the layout of the backend, or a skip that says why it cannot run here."""
    packed = packed_experts(hidden=hidden, features=features)
    experts = on_device(to_hopper(packed) if backend == "mosaic_gpu" else packed)
    reason = KERNELS.module(backend).unsupported(tokens_of(1, hidden=hidden), jnp.zeros((1, 2), jnp.int32), experts)
    if reason is not None:
        pytest.skip(reason)
    return packed, experts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 256, 300])
@pytest.mark.parametrize(("hidden", "features"), SIZES)
@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
def test_the_op_is_its_definition(backend, hidden, features, tokens, case):
    """Decode and prefill, at any imbalance: within 1e-3 of float64 beyond the rounding of activations."""
    packed, experts = stacks(backend, hidden, features)
    x, ids, weights = tokens_of(tokens, hidden=hidden), routing(tokens, case), weights_of(tokens)
    expected = definition(x, ids, weights, packed)
    found = run(x, jnp.asarray(ids), weights, experts, backend=backend)
    if np.any(expected):
        assert relative_error(found, expected) < 1e-3


@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [
        (8, [(0, 8), (0, 4), (4, 8), *((token, token + 1) for token in range(8))]),
        (64, [(0, 64), (0, 20), (13, 40)]),
    ],
)
@pytest.mark.parametrize(("hidden", "features"), SIZES)
def test_bits_do_not_depend_on_the_block(hidden, features, tokens, blocks):
    """A token's result in the Hopper kernel: the same bits in any block, in any chunk, and in every run."""
    _, experts = stacks("mosaic_gpu", hidden, features)
    x, ids, weights = tokens_of(tokens, hidden=hidden), jnp.asarray(routing(tokens, "mixed")), weights_of(tokens)
    whole = np.asarray(run(x, ids, weights, experts, backend="mosaic_gpu"))
    for first, last in blocks:
        block = slice(first, last)
        part = run(x[block], ids[block], weights[block], experts, backend="mosaic_gpu")
        np.testing.assert_array_equal(np.asarray(part), whole[block])


def test_the_smallest_and_largest_scales():
    """The tensor cores see products down to 2**-60 and up to 12 unharmed."""
    packed, _ = stacks("mosaic_gpu", 512, 256)
    rng = np.random.default_rng(0)
    spread = jax.tree.map(np.copy, packed)
    for _, scales in (spread.gate, spread.up, spread.down):
        scales[:] = rng.choice(np.array([68, 100, 127, 128], np.uint8), scales.shape, p=(0.2, 0.4, 0.39, 0.01))
    x, ids, weights = tokens_of(4), routing(4, "mixed"), weights_of(4)
    experts = on_device(to_hopper(spread))
    found = run(x, jnp.asarray(ids), weights, experts, backend="mosaic_gpu")
    assert relative_error(found, definition(x, ids, weights, spread)) < 1e-3
