"""The timeline of the persistent step: drawn, labelled as projected, and in proportion to the bytes."""

import dataclasses

import pytest

from mimo_jax.config.model import PUBLISHED
from mimo_jax.config.presets import drafter_preset, preset
from mimo_jax.errors import UserError
from mimo_jax.planning import timeline
from mimo_jax.planning.machines import parse_target
from mimo_jax.planning.traffic import Plan
from mimo_jax.sharding import MeshShape

CONFIG = preset("mimo-v2.5-pro")
# Four layers of the real model: global and dense, then three with a window and experts.
SHORT = dataclasses.replace(CONFIG, layer_pattern=CONFIG.layer_pattern[:4], moe_pattern=CONFIG.moe_pattern[:4])
PLAN = Plan(SHORT, PUBLISHED, drafter_preset("mimo-v2.5-pro"), MeshShape(tensor=8), cache_itemsize=2)


def test_it_is_drawn_and_said_to_be_projected(tmp_path):
    """A picture, a line for layers that are alike, and every microsecond of the round in one of them."""
    pytest.importorskip("matplotlib")
    target = parse_target("8xh200")
    found = timeline.step_timeline(PLAN, target, 8)
    record = timeline.record_of(found, 8, target)
    text = timeline.text_of(record)
    assert "projected, not measured" in text and "layer" in text
    assert sum(sum(parts.values()) for parts in record["chain"].values()) == pytest.approx(record["round"])
    assert 0.3 < record["share_of_roofline"] < 0.87  # what the memory reached by itself
    assert all(-1e-6 < saved < record["round"] for saved in record["saved"].values())
    assert record["saved"]["half of attention"] > 4 * 3  # microseconds: four layers of more than seven
    timeline.draw(found, tmp_path / "round.png")
    assert (tmp_path / "round.png").read_bytes().startswith(b"\x89PNG")


def test_faster_memory_shortens_what_is_loaded():
    """The same step on H200 and B200."""
    slow, fast = (timeline.step_timeline(PLAN, parse_target(name), 8) for name in ("8xh200", "8xb200"))
    assert fast.round < slow.round


def test_groups_of_experts_are_refused():
    plan = dataclasses.replace(PLAN, shape=MeshShape(expert=2, tensor=4))
    with pytest.raises(UserError, match="--expert-parallel 2 must be 1"):
        timeline.step_timeline(plan, parse_target("8xh200"), 8)
