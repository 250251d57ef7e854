"""One contract for every backend: the definition's numbers, any imbalance, any slice; bad input is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels.expert_matmul import BACKENDS, PackedExperts, expert_ffn, to_hopper
from pallas_kernels.expert_matmul.reference import DECODE_TOKENS
from tests.kernels.expert_matmul.samples import (
    CASES,
    CHOSEN,
    EXPERTS,
    FEATURES,
    HIDDEN,
    definition,
    on_device,
    packed_experts,
    relative_error,
    routing,
    tokens_of,
    weights_of,
)

PACKED = packed_experts()
HOPPER = to_hopper(PACKED)
run = jax.jit(expert_ffn, static_argnames=("layer", "num_experts", "backend"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, DECODE_TOKENS, DECODE_TOKENS + 1, 60])
def test_the_op_is_its_definition(tokens, case):
    """Few tokens or many, at any imbalance: within 1e-3 of float64 beyond the rounding of activations, from any layout.

    That is the bound on W4A16. The last bits differ because hidden activations near a rounding boundary of bf16 fall
    on its other side in float32.
    """
    x, ids, weights = tokens_of(tokens), routing(tokens, case), weights_of(tokens)
    expected = definition(x, ids, weights, PACKED)
    found = run(x, ids, weights, on_device(PACKED))
    assert found.dtype == jnp.float32
    if np.any(expected):
        assert relative_error(found, expected) < 1e-3
    np.testing.assert_array_equal(found, run(x, ids, weights, on_device(HOPPER)))
    elsewhere = (ids == EXPERTS).all(axis=1)
    assert not np.asarray(found)[elsewhere].any()


def test_slices_of_the_features_add_up():
    """Tensor parallel: the results of two halves of every expert sum to the whole one's."""
    whole = packed_experts(features=2 * FEATURES)
    x, ids, weights = tokens_of(5, dtype=jnp.float32), routing(5, "mixed"), weights_of(5)
    total = 0.0
    for half in range(2):
        rows = slice(half * FEATURES, (half + 1) * FEATURES)
        gate, up = (tuple(leaf[:, rows] for leaf in stack) for stack in (whole.gate, whole.up))
        width = [FEATURES // part for part in (2, 32)]
        down = tuple(leaf[..., half * size : (half + 1) * size] for leaf, size in zip(whole.down, width))
        total = total + run(x, ids, weights, on_device(PackedExperts(gate, up, down)))
    assert relative_error(total, definition(x, ids, weights, whole)) < 1e-6  # float32 sums in another order


def test_layers_lie_one_after_the_other():
    """Stacks of several layers: `layer` selects, and nothing of the others is read."""
    experts = on_device(PACKED)
    per_layer = EXPERTS // 2
    x, ids, weights = tokens_of(3), routing(3, "mixed", experts=per_layer), weights_of(3)
    for layer in range(2):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer * per_layer :][:per_layer], experts)
        expected = run(x, ids, weights, own)
        others = jax.tree.map(
            lambda leaf, layer=layer: leaf.at[(1 - layer) * per_layer : (2 - layer) * per_layer].set(255), experts
        )
        found = run(x, ids, weights, others, layer=layer, num_experts=per_layer)
        np.testing.assert_array_equal(found, expected)


def test_ids_out_of_range_are_never_read():
    """They name no expert, and `checkify` reports them; the id one past the last is how to say "none"."""
    x, weights, experts = tokens_of(2), weights_of(2), on_device(PACKED)
    bad = jnp.array([[0, -1], [EXPERTS + 5, 2]])
    none = jnp.array([[0, EXPERTS], [EXPERTS, 2]])
    np.testing.assert_array_equal(run(x, bad, weights, experts), run(x, none, weights, experts))
    checked = checkify.checkify(lambda ids: expert_ffn(x, ids, weights, experts))
    error, _ = checked(bad)
    assert f"from -1 to {EXPERTS + 5}; there are {EXPERTS} experts" in (error.get() or "")
    assert checked(none)[0].get() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_TD": jnp.zeros((2, HIDDEN + 1))}, r"tokens of shape \(2, 513\)"),
        ({"x_TD": jnp.zeros((2, HIDDEN), jnp.int32)}, "dtype int32"),
        ({"ids_TX": jnp.zeros((3, CHOSEN), jnp.int32)}, r"ids \(3, 2\)"),
        ({"ids_TX": jnp.zeros((2, CHOSEN))}, "ids of dtype float32"),
        ({"layer": 1}, f"layer 1 of {EXPERTS} experts"),
        ({"num_experts": 4}, f"4 experts in stacks of {EXPERTS}"),
        ({"experts": jax.tree.map(lambda leaf: leaf.astype(np.int32), PACKED)}, "dtype int32"),
        ({"backend": "cutlass"}, "'cutlass' is unknown; known: mosaic_gpu, triton, reference"),
    ],
)
def test_bad_input_is_named(changes, message, unchecked):
    """Arguments that do not fit are an error that holds the value, before anything is compiled."""
    arguments = {"x_TD": tokens_of(2), "ids_TX": jnp.asarray(routing(2, "mixed")), "weights_TX": weights_of(2)}
    arguments |= {"experts": PACKED, **changes}
    with pytest.raises(ValueError, match=message):
        expert_ffn(**arguments)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"reference"}))
def test_a_named_backend_never_gives_way(backend):
    """On a CPU the GPU's backends say what they need, and which backend can serve the call."""
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU is here")
    with pytest.raises(NotImplementedError, match=rf"'{backend}' cannot serve this call: .*cpu.*; reference can"):
        expert_ffn(tokens_of(2), jnp.asarray(routing(2, "mixed")), weights_of(2), PACKED, backend=backend)
