"""What the target's uncertainty leaves to a drafter whose slots are blind to each other."""

import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.generation import Result, generate_batch
from mimo_jax.model import Model
from mimo_jax.sampling import Sampled
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training import ceiling
from tests.tiny import random_params, tiny_config

VOCAB = 8


def coin(copies: bool):
    """A target that says any of its tokens at first and then, if it `copies`, that token for ever."""

    def laws(params, rows, config, strategy):
        return np.eye(VOCAB)[rows] * (rows >= 0)[..., None] if copies else np.full((*rows.shape, VOCAB), 1 / VOCAB)

    def texts(model, prompts, strategy, slots, seeds):
        rng = np.random.default_rng(seeds)
        drawn = rng.integers(0, VOCAB, (len(prompts), 1 if copies else slots))
        return [types.SimpleNamespace(tokens=row.tolist()) for row in np.broadcast_to(drawn, (len(prompts), slots))]

    return laws, texts


@pytest.mark.parametrize("copies, expected", [(True, 1 + 1 + sum(VOCAB**-k for k in range(1, 7))), (False, 8)])
def test_ceiling_of_known_laws(monkeypatch, copies, expected):
    """Slots that repeat the first are accepted once in eight; slots that are independent always, but for counting."""
    laws, texts = coin(copies)

    def known(params, rows, config, strategy):
        found = laws(params, rows, config, strategy)
        found[:, 0] = 1 / VOCAB  # what follows the prefix of one token
        return found

    monkeypatch.setattr(ceiling, "_laws", known)
    monkeypatch.setattr(ceiling, "generate_batch", texts)
    model = types.SimpleNamespace(params={}, config=types.SimpleNamespace(vocab_size=VOCAB))
    found = ceiling.order_blind_ceiling(model, [[0]] * 40, Sampled(1.0), samples=4096)
    assert found == pytest.approx(expected, rel=0.06) and found <= 8


def test_entropy_of_a_uniform_target():
    """A target that knows nothing says log V nats per token, at any temperature."""
    config = tiny_config(layer_pattern=(0, 1), moe_pattern=(0, 1), mtp_layers=0, vocab_size=320)
    params = random_params(config) | {"head": jnp.zeros((320, config.hidden_size))}
    model = Model(config, params, Tokenizer.train(["def f(x):\n    return x\n"], 262), (), {})
    prompts = [[1, 2, 3], [4]]
    results: list[Result] = generate_batch(model, prompts, Sampled(0.7), 5, [0, 1])
    assert ceiling.entropy_per_token(model, prompts, results, Sampled(0.7)) == pytest.approx(math.log(320), rel=1e-5)
