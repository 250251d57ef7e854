"""Routing and experts: one result whichever way the experts are visited, and a gradient that agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.layouts.packed import PackedStacks
from mimo_jax.modeling.experts import DenseExperts, routed_ffn
from mimo_jax.modeling.moe import route
from mimo_jax.weights import dequantize, quantize_mx
from pallas_kernels.expert_matmul import DECODE_TOKENS, PackedExperts

EXPERTS, CHOSEN, WIDTH, HIDDEN = 8, 3, 64, 32
run = jax.jit(routed_ffn)
# float32 sums over 64 and 32 terms in another order, outputs of scale 1.
TOLERANCE = 2e-6


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> jnp.ndarray:
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def stacks(seed: int = 0) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    shape = (EXPERTS, HIDDEN, WIDTH)
    down = random((EXPERTS, WIDTH, HIDDEN), seed + 2, 0.15)
    return random(shape, seed, 0.12), random(shape, seed + 1, 0.12), down


def choices(tokens: int, case: str, seed: int = 9) -> jnp.ndarray:
    rng = np.random.default_rng(seed)
    if case == "one expert":  # every token's first choice is the same, as a collapsed router would do
        rest = np.stack([rng.permutation(EXPERTS - 1)[: CHOSEN - 1] for _ in range(tokens)])
        return jnp.asarray(np.concatenate([np.full((tokens, 1), EXPERTS - 1), rest], axis=1), jnp.int32)
    if case == "same few":  # all tokens agree completely: most experts stay untouched
        return jnp.tile(jnp.array([[1, 4, 6]], jnp.int32), (tokens, 1))
    return jnp.asarray(np.stack([rng.permutation(EXPERTS)[:CHOSEN] for _ in range(tokens)]), jnp.int32)


@jax.jit
def naive(x, ids, weights, experts):
    """Every expert applied to every token, then weighted: the definition."""
    gate, up, down = experts
    hidden = jax.nn.silu(jnp.einsum("td,efd->tef", x, gate)) * jnp.einsum("td,efd->tef", x, up)
    outputs = jnp.einsum("tef,edf->ted", hidden, down)
    return jnp.einsum("tx,txd->td", weights, jnp.take_along_axis(outputs, ids[..., None], axis=1))


@pytest.mark.parametrize("case", ["mixed", "one expert", "same few"])
@pytest.mark.parametrize("tokens", [1, DECODE_TOKENS, DECODE_TOKENS + 1, 50])
def test_every_strategy_gives_the_same_output(tokens, case):
    """Active experts one by one, or grouped; at any imbalance, no token is dropped."""
    x, ids, experts = random((tokens, WIDTH), 5), choices(tokens, case), stacks()
    weights = jax.nn.softmax(random((tokens, CHOSEN), 6))
    expected = naive(x, ids, weights, experts)
    np.testing.assert_allclose(run(x, ids, weights, DenseExperts(*experts)), expected, atol=TOLERANCE)


@pytest.mark.parametrize("tokens", [4, 50])
def test_packed_experts_equal_their_dequantised_copies(tokens):
    """MXFP4 experts read from their packed bytes give exactly what the expanded weights give."""
    x, ids = random((tokens, WIDTH), 5), choices(tokens, "mixed")
    weights = jax.nn.softmax(random((tokens, CHOSEN), 6))
    quantized = [quantize_mx(stack) for stack in stacks()]
    dense = DenseExperts(*(dequantize(stack) for stack in quantized))
    packed = PackedStacks(PackedExperts(*((stack.codes, stack.scales) for stack in quantized)), None)
    np.testing.assert_allclose(run(x, ids, weights, packed), run(x, ids, weights, dense), atol=TOLERANCE)


@pytest.mark.parametrize("case", ["mixed", "one expert"])
def test_gradients_of_the_grouped_path(case):
    """Training gets the gradient of the definition: for inputs, combine weights and all three matrices."""
    tokens = 40
    x, ids, experts = random((tokens, WIDTH), 5), choices(tokens, case), stacks()
    weights = jax.nn.softmax(random((tokens, CHOSEN), 6))
    cotangent = random((tokens, WIDTH), 7)

    def loss(function):
        return lambda x, weights, experts: jnp.sum(function(x, ids, weights, experts) * cotangent)

    found = jax.jit(jax.grad(loss(routed_ffn), argnums=(0, 1, 2)))(x, weights, DenseExperts(*experts))
    expected = jax.jit(jax.grad(loss(naive), argnums=(0, 1, 2)))(x, weights, experts)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        # float32 sums over up to 40 tokens; gradients of scale 10.
        np.testing.assert_allclose(one, other, atol=3e-5)


def test_selection_bias_only_selects():
    """The bias decides which experts run; their weights come from the unbiased scores and sum to one."""
    x, router = random((32, WIDTH), 1), random((EXPERTS, WIDTH), 2, 0.1)
    bias = jnp.zeros(EXPERTS).at[3].set(10.0).at[5].set(-10.0)
    ids, weights = route(x, router, bias, CHOSEN)
    assert bool(jnp.all(jnp.any(ids == 3, axis=1))) and not bool(jnp.any(ids == 5))
    scores = jax.nn.sigmoid(x @ router.T)
    picked = jnp.take_along_axis(scores, ids, axis=1)
    np.testing.assert_allclose(weights, picked / picked.sum(axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    plain_ids, _ = route(x, router, jnp.zeros(EXPERTS), CHOSEN)
    np.testing.assert_array_equal(jnp.sort(plain_ids), jnp.sort(jnp.argsort(-scores, axis=1)[:, :CHOSEN]))


def test_router_works_in_float32_on_bf16_activations():
    """Selections do not flip with the activation dtype: the router upcasts its input."""
    x = random((64, WIDTH), 1).astype(jnp.bfloat16)
    router = random((EXPERTS, WIDTH), 2, 0.1)
    ids, weights = route(x, router, jnp.zeros(EXPERTS), CHOSEN)
    same_ids, same_weights = route(x.astype(jnp.float32), router, jnp.zeros(EXPERTS), CHOSEN)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(ids, same_ids)
    np.testing.assert_array_equal(weights, same_weights)
