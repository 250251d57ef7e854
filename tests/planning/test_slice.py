"""One device's share as a model of its own: the bytes of the share, and rounds that run."""

import dataclasses

import jax
import pytest

from mimo_jax import decoding
from mimo_jax.config import preset
from mimo_jax.drafter_config import drafter_preset
from mimo_jax.drafting import PLAIN, BlockDrafter
from mimo_jax.planning.slice import (
    BlankDrafter,
    drafter_share,
    random_drafter,
    random_weights,
    seconds_per_round,
    share,
)
from mimo_jax.planning.traffic import Plan, resident_weights
from mimo_jax.sharding import Layout
from tests.tiny import tiny_config, tiny_drafter


def test_the_share_has_the_bytes_of_one_device_of_eight():
    """Every part that is split weighs in the share what it weighs on each of eight devices."""
    whole = Plan(preset("mimo-v2.5-pro"), drafter_preset("mimo-v2.5-pro"), Layout(tensor=8), 2)
    config = share(whole.config, 8, None)
    alone = Plan(config, drafter_share(whole.drafter, 8, len(config.layer_pattern)), Layout(), 2)
    expected, found = resident_weights(whole), resident_weights(alone)
    for part in ("experts", "QKV", "o_proj", "dense MLP", "head", "embedding"):
        assert found[part] == pytest.approx(expected[part], rel=2e-3), part


@pytest.mark.parametrize("kind", ["plain", "blank", "DFlash"])
def test_rounds_of_a_share_run(kind):
    """Rounds behind a filled cache are timed, with random packed weights and each kind of drafter."""
    heads = {"num_heads": 8, "num_kv_heads": 4, "sliding_num_kv_heads": 4}
    config = share(tiny_config(**heads, storage="mxfp4", moe_intermediate_size=64, intermediate_size=256), 2, 3)
    drafter = drafter_share(dataclasses.replace(tiny_drafter(num_target_layers=4), vocab_size=256), 2, 3)
    proposer = {"plain": PLAIN, "blank": BlankDrafter(), "DFlash": BlockDrafter(drafter)}[kind]
    weights = decoding.Weights(random_weights(config), random_drafter(drafter))
    seconds = seconds_per_round(config, weights, proposer, context=30, rounds=2, repeats=2)
    assert len(seconds) == 2 and min(seconds) > 0
    assert all(bool(jax.numpy.isfinite(leaf.astype("float32")).all()) for leaf in jax.tree.leaves(weights.drafter))
