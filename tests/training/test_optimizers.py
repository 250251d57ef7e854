"""Which weights Muon trains, which AdamW trains, and the learning rate over time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.modeling.backbone import abstract_params
from mimo_jax.training.optimizers import learning_rate, make_optimizer, matrix_axes
from tests.tiny import tiny_config


def trained_by_muon(params) -> dict[str, bool]:
    axes = jax.tree_util.tree_leaves_with_path(
        matrix_axes(params), is_leaf=lambda leaf: leaf is None or hasattr(leaf, "reduction_axis")
    )
    return {"/".join(key.key for key in path): leaf is not None for path, leaf in axes}


def test_matrices_go_to_muon_and_the_rest_to_adam():
    """Embedding, head, router, sinks, biases and norms are AdamW's; every other weight is a matrix for Muon."""
    chosen = trained_by_muon(abstract_params(tiny_config()))
    adam = ("embed", "head", "router", "router_bias", "sink", "weight")
    assert {name: name.split("/")[-1] not in adam for name in chosen} == chosen
    assert chosen["layers_1/moe/gate"] and chosen["layers_0/attention/qkv"] and chosen["mtp_0/eh_proj"]
    assert not chosen["embed"] and not chosen["layers_1/moe/router"] and not chosen["norm/weight"]


def test_each_expert_is_its_own_matrix():
    """Muon orthogonalises every expert by itself: one expert's update does not depend on another's gradient."""
    gradients = {
        "moe": {"gate": jnp.asarray(np.random.default_rng(0).standard_normal((3, 16, 24)), jnp.float32) * 1e-3}
    }
    params = {"moe": {"gate": jnp.ones((3, 16, 24))}}
    optimizer = make_optimizer(lambda step: 0.1, weight_decay=0.0)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    other = {"moe": {"gate": gradients["moe"]["gate"].at[1].multiply(-2.0)}}
    others, _ = optimizer.update(other, optimizer.init(params), params)
    updates, others = updates["moe"], others["moe"]
    # Newton-Schulz in float32; updates of size 0.02.
    np.testing.assert_allclose(updates["gate"][0], others["gate"][0], atol=1e-5)
    np.testing.assert_allclose(updates["gate"][1], -others["gate"][1], atol=1e-5)
    # Orthogonal up to Muon's loose five steps: all singular values of an update are alike.
    singular = np.linalg.svd(np.asarray(updates["gate"][2]), compute_uv=False)
    assert singular.max() / singular.min() < 2.5
    # Both optimisers share one rate: an update's root mean square is AdamW's usual 0.2 of it.
    assert float(jnp.sqrt(jnp.mean(updates["gate"] ** 2))) == pytest.approx(0.2 * 0.1, rel=0.2)


def test_learning_rate_rises_stays_and_falls():
    """Warm-up to the peak, a plateau until the descent starts, then a straight line to zero."""
    rate = learning_rate(1.0, warmup=10, decay_start=100, decay_steps=50)
    assert [round(float(rate(step)), 6) for step in (0, 5, 10, 99, 100, 125, 150, 200)] == [0, 0.5, 1, 1, 1, 0.5, 0, 0]
    constant = learning_rate(1.0, warmup=10, decay_start=0, decay_steps=0)
    assert float(constant(10_000)) == 1.0
