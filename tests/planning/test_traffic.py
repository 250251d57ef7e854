"""Byte counts of a plan against the published geometry's formulas, computed here by hand."""

import dataclasses

import numpy as np
import pytest

from mimo_jax.config.model import PUBLISHED
from mimo_jax.config.presets import drafter_preset, preset
from mimo_jax.errors import UserError
from mimo_jax.planning.forecast import Assumptions, roofline_seconds, tokens_per_second
from mimo_jax.planning.machines import parse_target
from mimo_jax.planning.traffic import (
    Plan,
    busiest_share,
    cache_bytes,
    distinct_experts,
    mesh_shape_for,
    resident_weights,
    round_flops,
    round_reads,
)
from mimo_jax.sharding import MeshShape

PRO = Plan(preset("mimo-v2.5-pro"), PUBLISHED, drafter_preset("mimo-v2.5-pro"), MeshShape(tensor=8), cache_itemsize=1)
EXPERT = 3 * 6144 * 2048 * 4.25 / 8  # bytes of one expert in MXFP4, scales included
MOE_LAYERS, LAYERS = 69, 70


def test_resident_bytes_follow_the_published_geometry():
    """Each of 8 devices holds 70.8 GB of weights (within 3 %): experts, QKV in FP8, o_proj in BF16, and the rest."""
    held = resident_weights(PRO)
    assert held["experts"] == pytest.approx(MOE_LAYERS * 384 * EXPERT / 8, rel=1e-3)
    assert held["QKV"] == pytest.approx(LAYERS * (128 * 192 + 8 * (192 + 128)) * 6144 / 8, rel=1e-3)
    assert held["o_proj"] == LAYERS * 6144 * 128 * 128 * 2 / 8
    assert held["head"] == held["embedding"] == 152_576 * 6144 * 2 / 8
    assert sum(held.values()) - held["drafter"] - held["MTP layers"] == pytest.approx(70.8e9, rel=0.03)


@pytest.mark.parametrize(("tokens", "distinct"), [(1, 8.0), (2, 15.8), (4, 31.0), (8, 59.5), (16, 109.8)])
def test_distinct_experts_of_even_routing(tokens, distinct):
    """D(T) = E (1 - (1 - k/E)^T) for 8 of 384, and a simulation agrees."""
    assert distinct_experts(PRO.config, tokens) == pytest.approx(distinct, abs=0.05)
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((300, tokens, 384)), axis=-1)[..., :8].reshape(300, -1)
    assert np.mean([len(set(row)) for row in chosen]) == pytest.approx(distinct, rel=0.02)


@pytest.mark.parametrize(("tokens", "draft", "experts", "total"), [(1, False, 1.384, 4.96), (8, True, 10.295, 14.80)])
def test_a_round_reads_what_the_formulas_say(tokens, draft, experts, total):
    """Experts as tabulated; in all 5.53 and 15.37 GB per round, less the router, which is split here: 0.57 GB."""
    reads = round_reads(PRO, tokens, 1024, draft)
    assert reads["experts"] == pytest.approx(experts * 1e9, rel=1e-3)
    assert sum(reads.values()) == pytest.approx(total * 1e9, rel=0.01)


def test_the_cache_grows_on_global_layers_only():
    """Ten global layers take 320 bytes per token and device in FP8, the sliding ones and the drafter a fixed amount."""
    growth = cache_bytes(PRO, 262_144) - cache_bytes(PRO, 131_072)
    assert growth == 131_072 * 10 * 320
    assert cache_bytes(PRO, 131_072) == pytest.approx(131_072 * 10 * 320, rel=0.03)


def test_flops_are_two_per_active_weight_and_token():
    """41 G weights work on a token; the embedding is looked up."""
    short = dataclasses.replace(PRO, config=dataclasses.replace(PRO.config, sliding_window=8))
    assert round_flops(short, 1, 8) * 8 / 2 == pytest.approx(41.0e9, rel=0.01)


@pytest.mark.parametrize(("expert", "tokens", "share"), [(8, 1, 2.58), (8, 8, 1.50), (4, 1, 1.76), (2, 8, 1.10)])
def test_expert_parallelism_is_uneven(expert, tokens, share):
    """The busiest device's experts over the mean's, against tabulated simulations."""
    plan = dataclasses.replace(PRO, shape=MeshShape(expert=expert, tensor=8 // expert))
    assert busiest_share(plan, tokens) == pytest.approx(share, rel=0.05)
    assert busiest_share(PRO, tokens) == 1


def test_rooflines_and_projections():
    """H200: 3.08 ms for a drafted round; at full bandwidth without all-reduces 6.30 tokens make 6.30 / t per second."""
    seconds = roofline_seconds(PRO, parse_target("8xh200"), 8, 1024, draft=True)
    assert seconds == pytest.approx(3.20e-3 - 0.57e9 / 4.8e12, rel=0.01)
    assert roofline_seconds(PRO, parse_target("8xB200"), 8, 1024, True) == pytest.approx(seconds * 4.8 / 8)
    ideal = Assumptions(1.0, 0.0)
    assert tokens_per_second(PRO, parse_target("8xh200"), 1024, 6.30, ideal) == pytest.approx(6.30 / seconds)
    slow = Assumptions(0.5, 10e-6)
    expected = 6.30 / (2 * seconds + (2 * 75 + 3) * 10e-6)
    assert tokens_per_second(PRO, parse_target("8xh200"), 1024, 6.30, slow) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("devices", "groups", "shape"),
    [
        (8, 1, MeshShape(tensor=8)),
        (16, 1, MeshShape(data=2, tensor=8)),
        (12, 1, MeshShape(data=3, tensor=4)),
        (7, 1, MeshShape(data=7)),
        (8, 4, MeshShape(expert=4, tensor=2)),
    ],
)
def test_a_copy_takes_as_many_devices_as_heads_allow(devices, groups, shape):
    """Eight key/value heads go to eight devices at most; more devices hold more copies."""
    assert mesh_shape_for(PRO.config, devices, groups) == shape


@pytest.mark.parametrize("text", ["8xh300", "h200", "0xh200", "17xh200", "8 x h200", ""])
def test_targets_that_do_not_exist_are_named(text):
    """Unknown GPUs and counts are an error that says what is known."""
    with pytest.raises(UserError, match="h100, h200, b200"):
        parse_target(text)
