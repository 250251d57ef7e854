"""The real programs, compiled for eight H200 that are not there."""

import dataclasses

import pytest

from mimo_jax.config.model import PUBLISHED
from mimo_jax.config.presets import drafter_preset, preset
from mimo_jax.planning.compiled import compile_programs
from mimo_jax.planning.machines import parse_target
from mimo_jax.planning.traffic import Plan, resident_weights
from mimo_jax.sharding import MeshShape
from tests.kernels.triton_tools import HAS_TRITON, needs_compiler

LAYERS = 2  # a global one with a dense MLP, a sliding one with experts


@needs_compiler
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # jax-triton 0.4 leaves it to Triton
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_drafted_round_moves_what_it_should(backend):
    """Two sums per layer, no gathered weight; the plain path expands experts, as the plan says, kernels nothing."""
    config = dataclasses.replace(preset("mimo-v2.5-pro"), layer_pattern=(0, 1), moe_pattern=(0, 1), mtp_layers=0)
    drafter = dataclasses.replace(
        drafter_preset("mimo-v2.5-pro"), num_layers=1, num_target_layers=LAYERS, target_layer_ids=(0, 1)
    )
    plan = Plan(config, PUBLISHED, drafter, MeshShape(tensor=8), cache_itemsize=2, backend=backend)
    program = compile_programs(plan, parse_target("8xh200"), context=16_384)["drafted round"]
    block = {"f32[8,6144]", "f32[6144,8]", "f32[1,8,6144]", "bf16[1,8,6144]"}
    sums = sum(count for kind, (count, _) in program.collectives.items() if kind.split()[-1] in block)
    assert sums == 2 * LAYERS + 1 + 2 + 1  # the embedding's rows; the drafter's layer, and its projection of features
    gathered = [kind for kind in program.collectives if kind.startswith("all-gather")]
    assert gathered == ["all-gather f32[8,384]"]  # the router's scores
    assert program.arguments == pytest.approx(sum(resident_weights(plan).values()), rel=0.02)
    if backend == "reference":
        assert program.beyond and all("/moe/" in place for place in program.beyond)
        assert sum(program.beyond.values()) > 5e8
    elif HAS_TRITON:
        assert not program.beyond
