"""QAT: what the rounded pass sees, what the offsets learn from it, and that the masters never notice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from mimo_jax.modeling.backbone import Backbone
from mimo_jax.training import qat
from mimo_jax.training.optimizers import make_optimizer
from mimo_jax.training.pretraining import TrainConfig, TrainState, train_step
from mimo_jax.weights import dequantize_mx, quantize_mx
from mimo_jax.weights.params import is_expert
from tests.tiny import random_params, random_tokens, tiny_config

CONFIG = tiny_config(layer_pattern=(0, 1), moe_pattern=(0, 1))
TRAIN = TrainConfig(batch=4, length=16, mtp_share=2, warmup=0, peak_rate=1e-2, decay_steps=40, qat=True)
PARAMS = random_params(CONFIG)
WINDOW = random_tokens(CONFIG, TRAIN.batch, TRAIN.length + 1)
TOKENS = WINDOW[:, :-1]
LOGITS = jax.jit(lambda params: Backbone(CONFIG).apply({"params": params}, TOKENS)[0])
LOSS = jax.jit(jax.value_and_grad(qat.rounding_loss), static_argnames="config")


def fresh_masters() -> TrainState:
    """A copy each time, since a step donates its state."""
    params = jax.tree.map(jnp.copy, PARAMS)
    return TrainState(params, make_optimizer(TRAIN.schedule, TRAIN.weight_decay).init(params), jnp.int32(0))


def random_offsets():
    """Offsets large enough to change the code of many weights."""
    zeros, rng = qat.begin(fresh_masters(), TRAIN).offsets, np.random.default_rng(5)
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32), zeros)


def test_the_rounded_pass_sees_the_exported_bytes():
    """What it multiplies with is, bit for bit, what the exported MXFP4 of masters plus offsets decodes to."""
    state = dataclasses.replace(qat.begin(fresh_masters(), TRAIN), offsets=random_offsets())
    seen = jax.jit(qat.quantize_experts)(state.params)
    experts = 0
    for (path, master), used in zip(jax.tree_util.tree_leaves_with_path(PARAMS), jax.tree.leaves(seen)):
        if is_expert(path):
            experts += 1
            name = path[-1].key
            exported = dequantize_mx(quantize_mx(np.asarray(master + state.offsets["layers_1"]["moe"][name])))
            assert np.asarray(used).tobytes() == np.asarray(exported).tobytes()
            assert not np.array_equal(used, dequantize_mx(quantize_mx(np.asarray(master))))
        else:
            np.testing.assert_array_equal(used, master)
    assert experts == 3


def test_rounding_loss_is_the_distance_to_the_masters():
    """KL(masters || rounded) per token in nats, by scipy; its gradient is that of the rounded weights."""
    offsets, masters_BTC = random_offsets(), LOGITS(PARAMS)
    found, gradient = LOSS(offsets, PARAMS, masters_BTC, TOKENS, CONFIG)
    rounded = jax.jit(qat.quantize_experts)(qat.shifted(PARAMS, offsets))
    distributions = [np.asarray(jax.nn.softmax(values), np.float64) for values in (masters_BTC, LOGITS(rounded))]
    assert float(found) > 1e-3
    np.testing.assert_allclose(found, scipy.stats.entropy(*distributions, axis=-1).mean(), rtol=1e-4)

    @jax.jit
    @jax.grad
    def of_weights(params):
        log_p = jax.nn.log_softmax(Backbone(CONFIG).apply({"params": params}, TOKENS)[0])
        return jnp.mean(jnp.sum(distributions[0] * (np.log(distributions[0]) - log_p), axis=-1))

    expected = of_weights(rounded)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert is_expert(path) and np.any(leaf)
        np.testing.assert_allclose(leaf, expected["layers_1"]["moe"][path[-1].key], atol=1e-6)


def test_masters_learn_as_without_qat():
    """The masters after steps of QAT are those of the same steps without, so one run holds both arms."""
    state, plain = qat.begin(fresh_masters(), TRAIN), fresh_masters()
    for _ in range(3):
        state, metrics = qat.qat_step(state, WINDOW, CONFIG, TRAIN)
        plain, expected = train_step(plain, WINDOW, CONFIG, TRAIN)
    assert float(metrics["loss"]) < 6 and int(state.step) == 3
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    # The same numbers in two differently fused programs.
    for one, other in zip(jax.tree.leaves(state.masters), jax.tree.leaves(plain)):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.offsets))


def test_offsets_undo_what_rounding_costs():
    """On masters that stand still, learning the offsets halves the distance that rounding to the nearest left."""
    masters_BTC, optimizer = LOGITS(PARAMS), qat.offset_optimizer(TRAIN)
    offsets = qat.begin(fresh_masters(), TRAIN).offsets
    state, distances = optimizer.init(offsets), []
    step = jax.jit(optimizer.update)
    for _ in range(TRAIN.decay_steps):
        distance, gradient = LOSS(offsets, PARAMS, masters_BTC, TOKENS, CONFIG)
        distances.append(float(distance))
        updates, state = step(gradient, state, offsets)
        offsets = optax.apply_updates(offsets, updates)
    assert distances[-1] < distances[0] / 2
