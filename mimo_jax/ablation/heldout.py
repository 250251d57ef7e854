"""Held-out text that a seed chooses, the same for all arms: so that arms are compared on the same text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mimo_jax.config.model import ModelConfig
from mimo_jax.evaluation.acceptance import prompts_of
from mimo_jax.evaluation.bits import Bits, bits_per_byte, heldout_of
from mimo_jax.weights import Params

PROMPT_TOKENS = 128


def _turned(tokens: np.ndarray, seed: int) -> np.ndarray:
    """The text from another place on, round to the same place; what is evenly spaced in it differs by seed."""
    return np.roll(tokens, -int(np.random.default_rng(seed).integers(len(tokens))))


def bits_of(
    params: Params, config: ModelConfig, data: Path, windows: int, seed: int, checkpoint: Path | None = None
) -> Bits:
    """Bits per byte on windows that the seed chooses."""
    tokens, lengths = heldout_of(data, checkpoint)
    return bits_per_byte(params, config, _turned(tokens, seed), lengths, windows, min(512, config.max_position - 1))


def prompts(data: Path, checkpoint: Path, count: int, seed: int) -> list[list[int]]:
    """Prompts that the seed chooses."""
    return prompts_of(_turned(heldout_of(data, checkpoint)[0], seed), count, PROMPT_TOKENS)
