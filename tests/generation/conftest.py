"""A model small enough to compile in seconds, with random weights and a tokenizer of its own."""

import dataclasses

import jax
import pytest

from mimo_jax.config.presets import preset
from mimo_jax.loading import Model
from mimo_jax.modeling.backbone import init_params
from mimo_jax.tokenizer import Tokenizer

TEXT = "def f(items, target):\n    for item in items:\n        return item == target  # the naïve way → 0\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 3, 300)


@pytest.fixture(scope="session")
def model(tokenizer) -> Model:
    config = dataclasses.replace(
        preset("mimo-tiny"),
        vocab_size=320,
        hidden_size=64,
        layer_pattern=(0, 1),
        moe_pattern=(0, 1),
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=4,
        sliding_window=8,
        max_position=700,
        init_range=0.2,  # wide, so that the next token is not nearly the same everywhere
        dtype="float32",
        mtp_layers=0,
    )
    return Model(config, init_params(config, jax.random.key(1)), tokenizer)
