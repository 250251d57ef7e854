"""Calibration of a whole model: what it measures, what it learns from, and experts that few tokens choose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.calibration.experts import Routed, round_experts
from mimo_jax.calibration.model import Calibrated, calibrate
from mimo_jax.calibration.rounding import round_calibrated
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.experts import DenseExperts, routed_ffn
from mimo_jax.modeling.moe import route
from mimo_jax.weights import MxTensor, dequantize_mx, expand, quantize_mx
from tests.tiny import random_params, random_tokens, tiny_config

CONFIG = tiny_config(layer_pattern=(0, 1, 0), moe_pattern=(0, 1, 1), num_experts=4, mtp_layers=0)
PARAMS = random_params(CONFIG)
WINDOWS = random_tokens(CONFIG, 24, 32)
STACKS = ("gate", "up", "down")


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    return calibrate(CONFIG, PARAMS, WINDOWS)


def stacks_of(params: dict, layer: int) -> list[MxTensor]:
    return [params[f"layers_{layer}"]["moe"][name] for name in STACKS]


def rounded_plainly(params: dict) -> dict:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: dequantize_mx(quantize_mx(leaf)) if path[-1].key in STACKS and "moe" in str(path) else leaf,
        params,
    )


def test_it_rounds_experts_and_nothing_else(calibrated: Calibrated) -> None:
    """Every stack of experts becomes MXFP4 of its shape; all other weights are the very same arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(PARAMS):
        found = calibrated.params
        for key in path:
            found = found[key.key]
        if path[-1].key in STACKS and path[-2].key == "moe":
            assert isinstance(found, MxTensor) and found.shape == leaf.shape
        else:
            assert found is leaf


def test_it_loses_less_than_plain_rounding(calibrated: Calibrated) -> None:
    """The model's own outputs on held-out windows: their squared error is that of plain rounding or, clearly, less."""
    run = jax.jit(lambda params: Backbone(CONFIG).apply({"params": params}, WINDOWS[7::8])[1].hidden)
    exact = run(PARAMS)
    errors = [
        float(jnp.sum((run(params) - exact) ** 2)) for params in (expand(calibrated.params), rounded_plainly(PARAMS))
    ]
    assert errors[0] < 0.9 * errors[1]
    for found in calibrated.errors.values():
        assert 0 < found["calibrated"] < found["plain"] < 0.1
    assert calibrated.tokens == 21 * 32


def test_held_out_windows_teach_nothing(calibrated: Calibrated) -> None:
    """Other tokens in every eighth window change no code and no scale."""
    changed = WINDOWS.copy()
    changed[7::8] = random_tokens(CONFIG, 3, 32, seed=9)
    again = calibrate(CONFIG, PARAMS, changed)
    assert again.errors["heldout"] != calibrated.errors["heldout"]
    for layer in (1, 2):
        for one, other in zip(stacks_of(calibrated.params, layer), stacks_of(again.params, layer)):
            np.testing.assert_array_equal(one.codes, other.codes)
            np.testing.assert_array_equal(one.scales, other.scales)


def routed(tokens: int, seed: int = 0) -> Routed:
    """Inputs of the first MoE layer's experts, of which expert 3 is never chosen; none held out."""
    moe = PARAMS["layers_1"]["moe"]
    x_TD = np.random.default_rng(seed).standard_normal((tokens, CONFIG.hidden_size)).astype(np.float32)
    ids, weights = route(x_TD, moe["router"], jnp.array([0.0, 0.0, 0.0, -9.0]), CONFIG.experts_per_token)
    return Routed(x_TD, x_TD, np.asarray(ids), np.asarray(weights), np.zeros(tokens, bool))


def test_outputs_are_those_of_the_modules() -> None:
    """What is measured is what the MoE layer computes from exact, plain and calibrated weights, token for token."""
    given, moe = routed(1500), PARAMS["layers_1"]["moe"]
    exact = [moe[name] for name in STACKS]
    found, outputs, fewest = round_experts(exact, given, lambda: None)
    plain = [dequantize_mx(quantize_mx(stack)) for stack in exact]
    for stacks, ours in zip(
        (exact, plain, [dequantize_mx(stack) for stack in found]), dataclasses.astuple(outputs), strict=True
    ):
        expected = routed_ffn(given.x_TD, given.ids_TX, given.weights_TX, DenseExperts(*stacks))
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert fewest == 0


def test_an_expert_without_tokens_is_rounded_by_itself() -> None:
    """As if its inputs were independent: each block with the scale that loses least."""
    exact = [PARAMS["layers_1"]["moe"][name] for name in STACKS]
    found, _, _ = round_experts(exact, routed(64), lambda: None)
    for stack, rounded in zip(exact, found):
        alone = round_calibrated(stack[3], jnp.eye(stack.shape[-1]))
        np.testing.assert_array_equal(rounded.codes[3], alone.codes)
        np.testing.assert_array_equal(rounded.scales[3], alone.scales)
