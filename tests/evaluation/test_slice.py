"""One device's share as a model of its own: the bytes of the share, and rounds that run."""

import dataclasses

import jax
import pytest

from mimo_jax.config.model import PUBLISHED
from mimo_jax.config.presets import drafter_preset, preset
from mimo_jax.decode.drafter import PLAIN, Weights
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.evaluation.slice import BlankDrafter, drafter_share, random_weights, seconds_per_round, share
from mimo_jax.layouts import packed
from mimo_jax.planning.traffic import Plan, resident_weights
from mimo_jax.sharding import MeshShape
from mimo_jax.weights.params import drafter_weights
from mimo_jax.weights.params import weights as weights_of
from tests.tiny import tiny_config, tiny_drafter


def test_the_share_has_the_bytes_of_one_device_of_eight():
    """Every part that is split weighs in the share what it weighs on each of eight devices."""
    whole = Plan(preset("mimo-v2.5-pro"), PUBLISHED, drafter_preset("mimo-v2.5-pro"), MeshShape(tensor=8), 2)
    config = share(whole.config, 8, None)
    alone = Plan(config, PUBLISHED, drafter_share(whole.drafter, 8, len(config.layer_pattern)), MeshShape(), 2)
    expected, found = resident_weights(whole), resident_weights(alone)
    for part in ("experts", "QKV", "o_proj", "dense MLP", "head", "embedding"):
        assert found[part] == pytest.approx(expected[part], rel=2e-3), part


@pytest.mark.parametrize("kind", ["plain", "blank", "DFlash"])
def test_rounds_of_a_share_run(kind):
    """Rounds after a filled cache are timed, with random packed weights and each kind of drafter."""
    heads = {"num_heads": 8, "num_kv_heads": 4, "sliding_num_kv_heads": 4}
    config = share(tiny_config(**heads, moe_intermediate_size=64, intermediate_size=256), 2, 3)
    drafter = drafter_share(dataclasses.replace(tiny_drafter(num_target_layers=4), vocab_size=256), 2, 3)
    proposer = {"plain": PLAIN, "blank": BlankDrafter(), "DFlash": DFlashDrafter(drafter)}[kind]
    _, params = packed.pack(config, random_weights(weights_of(config, PUBLISHED)))
    weights = Weights(params, random_weights(drafter_weights(drafter, "bfloat16")))
    seconds = seconds_per_round(config, weights, proposer, context=30, rounds=2, repeats=2)
    assert len(seconds) == 2 and min(seconds) > 0
    assert all(bool(jax.numpy.isfinite(leaf.astype("float32")).all()) for leaf in jax.tree.leaves(weights.drafter))
