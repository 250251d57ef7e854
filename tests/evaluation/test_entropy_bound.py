"""What the target's uncertainty leaves to a drafter whose drafts are blind to each other."""

import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.decode.sampling import Sampled
from mimo_jax.evaluation import entropy_bound
from mimo_jax.generation import Request, Result, generate_batch
from mimo_jax.loading import Model
from mimo_jax.tokenizer import Tokenizer
from tests.tiny import random_params, tiny_config

VOCAB = 8


def coin(copies: bool):
    """A target that says any of its tokens at first and then, if it `copies`, that token for ever."""

    def distributions(params, rows, config, strategy):
        return np.eye(VOCAB)[rows] * (rows >= 0)[..., None] if copies else np.full((*rows.shape, VOCAB), 1 / VOCAB)

    def texts(model, requests):
        rng, count = np.random.default_rng([request.seed for request in requests]), requests[0].max_tokens
        drawn = rng.integers(0, VOCAB, (len(requests), 1 if copies else count))
        return [types.SimpleNamespace(tokens=row.tolist()) for row in np.broadcast_to(drawn, (len(requests), count))]

    return distributions, texts


@pytest.mark.parametrize("copies, expected", [(True, 1 + 1 + sum(VOCAB**-k for k in range(1, 7))), (False, 8)])
def test_bound_of_known_distributions(unchecked, monkeypatch, copies, expected):
    """Drafts that repeat the first are accepted once in eight; drafts that are independent always, but for counting."""
    distributions, texts = coin(copies)

    def known(params, rows, config, strategy):
        found = distributions(params, rows, config, strategy)
        found[:, 0] = 1 / VOCAB  # what follows the prefix of one token
        return found

    monkeypatch.setattr(entropy_bound, "_distributions", known)
    monkeypatch.setattr(entropy_bound, "generate_batch", texts)
    model = types.SimpleNamespace(params={}, config=types.SimpleNamespace(vocab_size=VOCAB))
    found = entropy_bound.order_blind_bound(model, [[0]] * 40, Sampled(1.0), samples=4096)
    assert found == pytest.approx(expected, rel=0.06) and found <= 8


def test_entropy_of_a_uniform_target():
    """A target that knows nothing says log V nats per token, at any temperature."""
    config = tiny_config(layer_pattern=(0, 1), moe_pattern=(0, 1), mtp_layers=0, vocab_size=320)
    params = random_params(config) | {"head": jnp.zeros((320, config.hidden_size))}
    model = Model(config, params, Tokenizer.train(["def f(x):\n    return x\n"], 262))
    prompts = [[1, 2, 3], [4]]
    results: list[Result] = generate_batch(
        model, [Request(prompt, Sampled(0.7), 5, seed) for seed, prompt in enumerate(prompts)]
    )
    assert entropy_bound.entropy_per_token(model, prompts, results, Sampled(0.7)) == pytest.approx(
        math.log(320), rel=1e-5
    )
