"""What MXFP4 costs a small model, by the rule that chooses scales, with QAT and without.

The masters of a seed are the same in all arms: QAT learns beside them (`training.qat`).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.ablation.experiments import Metrics
from mimo_jax.ablation.heldout import bits_of
from mimo_jax.ablation.training import trained
from mimo_jax.config.model import ModelConfig
from mimo_jax.config.presets import preset
from mimo_jax.evaluation.bits import as_bf16
from mimo_jax.training.corpus import load_tokens
from mimo_jax.training.pretraining import TrainConfig, init_state
from mimo_jax.training.qat import begin, quantize_experts
from mimo_jax.training.run import pretraining_update

LENGTH = 256  # tokens of a sequence


def config_of(width: int) -> ModelConfig:
    """Four layers, three of them with experts."""
    return dataclasses.replace(
        preset("mimo-tiny"),
        hidden_size=width,
        layer_pattern=(0, 1, 1, 0),
        moe_pattern=(0, 1, 1, 1),
        num_heads=4,
        num_kv_heads=2,
        sliding_num_kv_heads=2,
        intermediate_size=4 * width,
        moe_intermediate_size=width,
        mtp_layers=0,
        dtype="float32",
    )


def run(settings: dict[str, Any], seed: int, folder: Path) -> Metrics:
    data = Path(settings["data"])
    config, tokens = config_of(settings["width"]), load_tokens(data, "train")
    first, second = _schedules(settings, seed)
    begun = second.decay_start
    state: Any = jax.tree.map(jnp.copy, _masters(config, first, data, begun))  # training takes what it is given
    if second.qat:
        state = begin(state, second)
    state = trained(state, pretraining_update(tokens, config, second), range(begun, begun + second.decay_steps))
    masters = state.masters.params if second.qat else state.params
    rounded = quantize_experts(as_bf16(state.params), settings["rule"])
    exact, found = (
        bits_of(params, config, data, settings["windows"], seed).bits_per_byte for params in (as_bf16(masters), rounded)
    )
    return {"bits_per_byte": found, "loss": 100 * (found / exact - 1)}


@functools.lru_cache(maxsize=1)  # a study runs all arms of a seed before the next seed
def _masters(config: ModelConfig, train: TrainConfig, data: Path, steps: int) -> Any:
    update = pretraining_update(load_tokens(data, "train"), config, train)
    return trained(init_state(config, train), update, range(steps))


def _schedules(settings: dict[str, Any], seed: int) -> tuple[TrainConfig, TrainConfig]:
    """The rate falls to zero, then once more from a fifth, with QAT: as the bundled model was trained."""
    steps, descent = settings["steps"], settings["descent"]
    first = TrainConfig(settings["batch"], LENGTH, decay_start=steps, decay_steps=descent, seed=seed)
    again = {"peak_rate": first.peak_rate / 5, "decay_start": steps + descent, "scale_rule": settings["rule"]}
    return first, dataclasses.replace(first, qat=settings["qat"], **again)
