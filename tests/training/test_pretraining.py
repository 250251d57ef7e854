"""One training step: what it minimises, how experts stay balanced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.errors import UserError
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.training import pretraining
from mimo_jax.training.optimizers import make_optimizer
from mimo_jax.training.pretraining import TrainConfig, balance_experts, loss_fn
from tests.tiny import random_params, random_tokens, tiny_config

CONFIG = tiny_config(layer_pattern=(0, 1), moe_pattern=(0, 1))
TRAIN = TrainConfig(batch=4, length=16, mtp_share=2)
PARAMS = random_params(CONFIG)
WINDOW = random_tokens(CONFIG, TRAIN.batch, TRAIN.length + 1)


def test_loss_is_next_token_plus_weighted_mtp():
    """The objective is the mean next-token loss of the whole batch plus 0.3 of the MTP loss of a share of it."""
    total, (loss, mtp_loss, counts, found) = jax.jit(loss_fn, static_argnums=(2, 3))(PARAMS, WINDOW, CONFIG, TRAIN)
    model = Backbone(CONFIG)
    tokens, targets = WINDOW[:, :-1], WINDOW[:, 1:]
    logits, ahead = jax.jit(lambda p, t: model.apply({"params": p}, t, method="everything"))(PARAMS, tokens)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    assert float(loss) == pytest.approx(-np.take_along_axis(log_p, targets[..., None], 2).mean(), rel=1e-5)
    # Position t of MTP layer 1 predicts token t + 2: the first two sequences, all but the last position.
    log_p = np.asarray(jax.nn.log_softmax(ahead[0]))[:2, :-1]
    expected = -np.take_along_axis(log_p, targets[:2, 1:, None], 2).mean()
    assert float(mtp_loss) == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(float(loss) + 0.3 * float(mtp_loss), rel=1e-6)
    assert counts.shape == (1, CONFIG.num_experts)
    assert int(counts.sum()) == TRAIN.batch * TRAIN.length * CONFIG.experts_per_token


def test_bias_moves_towards_idle_experts():
    """The selection bias of an overloaded expert falls, of an idle one rises, each by the fixed step."""
    counts = jnp.array([[0, 0, 4, 4, 4, 4, 8, 8]])
    before = PARAMS["layers_1"]["moe"]["router_bias"]
    after = balance_experts(PARAMS, counts, CONFIG, rate=0.01)
    moved = after["layers_1"]["moe"]["router_bias"] - before
    np.testing.assert_allclose(moved, [0.01, 0.01, 0, 0, 0, 0, -0.01, -0.01], atol=1e-7)
    assert after["layers_1"]["moe"]["gate"] is PARAMS["layers_1"]["moe"]["gate"]
    np.testing.assert_array_equal(PARAMS["layers_1"]["moe"]["router_bias"], before)


def test_balancing_spreads_a_collapsed_router():
    """A router that sends everything to the same experts is spread by bias updates alone, weights untouched."""
    moe = PARAMS["layers_1"]["moe"]
    collapsed = {**moe, "router_bias": jnp.zeros(CONFIG.num_experts).at[:2].set(1.0)}
    params = {**PARAMS, "layers_1": {**PARAMS["layers_1"], "moe": collapsed}}
    run = jax.jit(lambda p: Backbone(CONFIG).apply({"params": p}, WINDOW)[1].expert_counts)
    first = np.asarray(run(params))
    for _ in range(40):
        params = balance_experts(params, run(params), CONFIG, rate=0.05)
    last = np.asarray(run(params))
    assert first.max() / first.mean() == CONFIG.num_experts / CONFIG.experts_per_token
    assert last.max() / last.mean() < 1.6


def test_a_few_steps_learn():
    """Training on one repeated batch lowers its loss."""
    train = dataclasses.replace(TRAIN, warmup=2, peak_rate=1e-2)
    params = jax.tree.map(jnp.copy, PARAMS)  # the step donates its state
    state = pretraining.TrainState(
        params, make_optimizer(train.schedule, train.weight_decay).init(params), jnp.int32(0)
    )
    losses = []
    for _ in range(8):
        state, metrics = pretraining.train_step(state, WINDOW, CONFIG, train)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 8


@pytest.mark.parametrize("field, value", [("batch", 0), ("length", -1), ("peak_rate", 0.0), ("decay_steps", -5)])
def test_nonsense_settings_are_named(field, value):
    """A training setting that makes no sense is a one-line error."""
    with pytest.raises(UserError, match=f"{field}={value}"):
        TrainConfig(**{field: value})
