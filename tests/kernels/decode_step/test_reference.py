"""The rows of a step, run one after the other, are the Flax step; and a token's bits do not depend on its block."""

import dataclasses
from functools import cache, partial

import jax
import numpy as np
import pytest

import mimo_jax as mimo
from mimo_jax.checkpoint.read import read
from mimo_jax.config.geometry import target_of
from mimo_jax.config.model import GLOBAL, SLIDING
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.cache import init_cache
from mimo_jax.weights import expand
from pallas_kernels.decode_step import reference, schedule
from pallas_kernels.decode_step.assigned import assigned_rows
from pallas_kernels.decode_step.reference import KindCache, run
from pallas_kernels.decode_step.schedule import Kind, claimed_rows, step_phases
from tests.tiny import random_params, random_tokens, tiny_config

ROWS = {"claimed": claimed_rows, "assigned": partial(assigned_rows, devices=1, ctas=5)}
MODELS = {
    "tiny": tiny_config(),
    # Three projections, sinks everywhere, more key/value heads on sliding layers, widths that do not divide by units.
    "uneven": tiny_config(
        fused_qkv=False,
        num_heads=8,
        sliding_num_kv_heads=4,
        sink_on_global=True,
        hidden_size=72,
        intermediate_size=88,
        moe_intermediate_size=24,
    ),
    "bundled": None,
}


@pytest.fixture(autouse=True)
def fine(monkeypatch):
    """Small models are split as large ones are."""
    monkeypatch.setattr(schedule, "ROW_PRODUCTS", 512)
    monkeypatch.setattr(reference, "KEY_BLOCK", 4)


@cache
def model_of(name):
    """A config in float32, and its parameters as plain arrays."""
    if name == "bundled":
        found = read(mimo.BUNDLED)
        return dataclasses.replace(found.config, dtype="float32"), expand(found.params)
    return MODELS[name], jax.tree.map(np.asarray, random_params(MODELS[name]))


def stacked(config, layers):
    """One stack for global layers, and one for sliding ones."""

    def stack(kind):
        held = [layer for layer, is_of in zip(layers, config.layer_pattern) if is_of == kind]
        return KindCache(
            np.stack([np.array(layer.keys) for layer in held]), np.stack([np.array(layer.values) for layer in held])
        )

    return stack(GLOBAL), stack(SLIDING)


COUNTS = {"tiny": (8, (5, 8)), "uneven": (4, (4, 2)), "bundled": (8, (8,))}  # tokens of a step, and how many are real


@cache
def flax_step(name):
    """Tokens after a prefill of unequal lengths, the cache before them, and all that the Flax step makes of them."""
    config, params = model_of(name)
    tokens, counts = COUNTS[name]
    batch, filled = len(counts), init_cache(config, len(counts), 64)
    step = jax.jit(Backbone(config, tuple(range(config.num_layers))).apply)
    for seed, counted in enumerate(((4, 3), (4, 2), (3, 4))):  # steps of one shape, compiled once
        read_B = np.array(counted[:batch])
        filled = step({"params": params}, random_tokens(config, batch, tokens, seed), filled, read_B)[2]
    tokens_BT = random_tokens(config, batch, tokens, seed=9)
    return tokens_BT, filled, step({"params": params}, tokens_BT, filled, np.array(counts))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_flax_step(name, kind):
    """Logits, hidden states after every layer, expert counts and the cache: within 1e-5 of the largest."""
    (config, params), (tokens, counts) = model_of(name), COUNTS[name]
    tokens_BT, filled, (expected, features, updated) = flax_step(name)
    target = target_of(config)
    rows = ROWS[kind](step_phases(target, tokens, len(counts)))
    caches, lengths_B = stacked(config, filled.layers), np.asarray(filled.lengths)
    found = run(rows, target, params, tokens_BT, *caches, lengths_B, np.array(counts))

    is_real = np.arange(tokens) < np.array(counts)[:, None]
    for ours, theirs in (
        (found.logits_BTC, expected),
        (found.hidden_BTD, features.hidden),
        (np.concatenate(found.aux_LBTD, axis=-1), features.aux),
    ):
        assert_close(ours[is_real], np.asarray(theirs)[is_real])
    np.testing.assert_array_equal(found.expert_counts_LE, features.expert_counts)
    np.testing.assert_array_equal(found.picked_BT[is_real], np.argmax(expected, axis=-1)[is_real])
    for ours, theirs in zip((found.global_cache, found.sliding_cache), stacked(config, updated.layers)):
        assert_close(ours.keys, theirs.keys)
        assert_close(ours.values, theirs.values)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["tiny", "uneven"])
def test_a_token_has_the_same_bits_in_any_block(name, kind):
    """Sixteen tokens after sixteen others, whose ring has turned round: by 1, 4, 8 and 16."""
    config, params = model_of(name)
    target, tokens_BT = target_of(config), random_tokens(config, 1, 32)

    def read_by(block, caches, first):
        rows, logits = ROWS[kind](step_phases(target, block)), []
        for start in range(first, first + 16, block):
            lengths, counts = np.array([start]), np.array([block])
            step = run(rows, target, params, tokens_BT[:, start : start + block], *caches, lengths, counts)
            caches = (step.global_cache, step.sliding_cache)
            logits.append(step.logits_BTC)
        return np.concatenate(logits, axis=1), caches

    empty = init_cache(dataclasses.replace(config, sliding_window=config.sliding_window + 8), 1, 40)
    filled = read_by(16, stacked(config, empty.layers), 0)[1]
    expected, caches = read_by(16, filled, 16)
    for block in (1, 4, 8):
        logits, others = read_by(block, filled, 16)
        np.testing.assert_array_equal(logits, expected)
        for ours, theirs in zip(others, caches):
            np.testing.assert_array_equal(ours.keys, theirs.keys)
            np.testing.assert_array_equal(ours.values, theirs.values)


@pytest.mark.parametrize("kind", [Kind.EMBED, Kind.QKV, Kind.QUERIES, Kind.GATE_UP, Kind.EXPERT_DOWN, Kind.HEAD])
def test_a_missing_row_shows(kind):
    """What no row has computed is not a number."""
    config, params = model_of("tiny")
    target = target_of(config)
    rows = claimed_rows(step_phases(target, 2))
    rows.pop(next(place for place, row in enumerate(rows) if row.kind == kind))
    caches = stacked(config, init_cache(config, 1, 32).layers)
    step = run(rows, target, params, random_tokens(config, 1, 2), *caches, np.array([0]), np.array([2]))
    assert np.isnan(step.logits_BTC).any()
