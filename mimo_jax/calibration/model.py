"""Runs a text through a model layer by layer and rounds the experts on the way: later layers read what is left of it
after the rounding of earlier ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mimo_jax.calibration.experts import Routed, round_experts
from mimo_jax.cli.progress import progress
from mimo_jax.config.model import ModelConfig
from mimo_jax.modeling.backbone import Block
from mimo_jax.modeling.layers import rotary_table
from mimo_jax.modeling.moe import route
from mimo_jax.weights import Params, expand
from mimo_jax.weights.params import STACKS

_BATCH = 4  # windows that attention reads at once
_HELD_OUT = 8  # the last of every so many windows is measured and not learnt from


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Parameters whose experts are MXFP4, and what the rounding of a layer costs: squared error over squared output of
    its experts, as they read the same inputs; the mean over layers.
    """

    params: Params
    errors: dict[str, dict[str, float]]  # of "plain" and "calibrated" rounding, on "calibration" and "heldout" windows
    tokens: int  # learnt from
    fewest_tokens: int  # that an expert learnt from


def calibrate(config: ModelConfig, params: Params, windows_NT: Int[np.ndarray, "N T"]) -> Calibrated:
    """Rounds the experts of `params`, which may be of any file format, in float32.

    Memory holds the text's activations and a few copies, one expanded attention and one expanded expert.
    """
    config = dataclasses.replace(config, dtype="float32")
    heldout_N = np.arange(len(windows_NT)) % _HELD_OUT == _HELD_OUT - 1
    x_NTD = np.asarray(params["embed"])[windows_NT].astype(np.float32)
    rounded, errors, fewest = dict(params), [], windows_NT.size
    with progress("calibrating", sum(config.moe_pattern) * config.num_experts, "experts") as bar:
        for index, (kind, has_experts) in enumerate(zip(config.layer_pattern, config.moe_pattern)):
            layer = params[f"layers_{index}"]
            rest = expand({name: node for name, node in layer.items() if name != "moe"})
            if not has_experts:
                (x_NTD,) = _in_batches(partial(_whole_layer, rest, config, kind), x_NTD)
                continue
            x_NTD, normed_NTD = _in_batches(partial(_before_experts, rest, config, kind), x_NTD)
            routed = _routed(x_NTD, normed_NTD, heldout_N, layer["moe"], config)
            stacks, outputs, seen = round_experts([layer["moe"][name] for name in STACKS], routed, bar.advance)
            x_NTD += outputs.calibrated_TD.reshape(x_NTD.shape)
            rounded[f"layers_{index}"] = layer | {"moe": layer["moe"] | dict(zip(STACKS, stacks))}
            errors.append([outputs.errors(~routed.heldout_T), outputs.errors(routed.heldout_T)])
            fewest = min(fewest, seen)
    means = np.mean(errors, axis=0).tolist()
    named = {text: dict(zip(("plain", "calibrated"), pair)) for text, pair in zip(("calibration", "heldout"), means)}
    return Calibrated(rounded, named, windows_NT[~heldout_N].size, fewest)


def _routed(
    x_NTD: np.ndarray, normed_NTD: np.ndarray, heldout_N: np.ndarray, moe: Params, config: ModelConfig
) -> Routed:
    x_TD = normed_NTD.reshape(-1, config.hidden_size)
    ids_TX, weights_TX = route(jnp.asarray(x_TD), moe["router"], moe["router_bias"], config.experts_per_token)
    heldout_T = np.repeat(heldout_N, normed_NTD.shape[1])
    return Routed(x_NTD.reshape(x_TD.shape), x_TD, np.asarray(ids_TX), np.asarray(weights_TX), heldout_T)


def _in_batches(run: Callable[[np.ndarray], tuple[Array, ...]], x_NTD: np.ndarray) -> tuple[np.ndarray, ...]:
    parts = [run(x_NTD[first : first + _BATCH]) for first in range(0, len(x_NTD), _BATCH)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts))


@partial(jax.jit, static_argnames=("config", "kind"))
def _whole_layer(params: Params, config: ModelConfig, kind: int, x_BTD: Array) -> tuple[Array]:
    """A layer without experts."""
    return (Block(config, kind, False).apply({"params": params}, x_BTD, *_places(config, kind, x_BTD))[0],)


@partial(jax.jit, static_argnames=("config", "kind"))
def _before_experts(params: Params, config: ModelConfig, kind: int, x_BTD: Array) -> tuple[Array, Array]:
    """The residual stream after attention, and what the router and the experts read of it."""

    def run(block: Block, x_BTD: Array, *places) -> tuple[Array, Array]:
        x_BTD = x_BTD + block.attention(block.input_norm(x_BTD), *places)[0]
        return x_BTD, block.post_norm(x_BTD)

    return Block(config, kind, True).apply({"params": params}, x_BTD, *_places(config, kind, x_BTD), method=run)


def _places(config: ModelConfig, kind: int, x_BTD: Array) -> tuple[Any, ...]:
    """The rotary table of whole windows, no cache, no length before them, and all of their tokens real."""
    batch, steps = x_BTD.shape[:2]
    positions_BT = jnp.broadcast_to(jnp.arange(steps), (batch, steps))
    rotary = rotary_table(positions_BT, config.rotary_dim, config.theta(kind), jnp.float32)
    return rotary, None, jnp.zeros(batch, jnp.int32), jnp.full(batch, steps)
