"""Held-out bits per byte, and what rounding the experts to MXFP4 costs with and without QAT."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.calibration.model import calibrate
from mimo_jax.calibration.texts import spaced_windows
from mimo_jax.cli.progress import progress
from mimo_jax.config.model import ModelConfig
from mimo_jax.errors import UserError, check_whole
from mimo_jax.evaluation.ratios import ratio
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training.corpus import TOKENIZER, check_same_tokenizer, check_vocabulary, load_tokens
from mimo_jax.training.pretraining import cross_entropy
from mimo_jax.training.qat import QatState, quantize_experts
from mimo_jax.training.run import check_tokenizer, latest_state, read_settings
from mimo_jax.weights import Params, expand

_CALIBRATION_WINDOWS, _CALIBRATION_WINDOW = 128, 512  # their number, and the tokens of each


@dataclasses.dataclass(frozen=True)
class Bits:
    """Bits per byte over `tokens` held-out tokens standing for `size` bytes; `error` is one standard error."""

    bits_per_byte: float
    error: float
    tokens: int
    size: int


@partial(jax.jit, static_argnames="config")
def _nats_per_window(params: Params, window_BT: Int[Array, "B _"], config: ModelConfig) -> Float[Array, "B"]:
    logits_BTC, _, _ = Backbone(config).apply({"params": params}, window_BT[:, :-1])
    return jnp.sum(cross_entropy(logits_BTC, window_BT[:, 1:]), axis=-1)


def bits_per_byte(
    params: Params,
    config: ModelConfig,
    tokens: np.ndarray,
    byte_lengths: np.ndarray,
    windows: int,
    length: int = 512,
    batch: int = 8,
) -> Bits:
    """Mean over `windows` evenly spaced windows of `length` predicted tokens; the same windows for every model."""
    available = (len(tokens) - 1) // length
    check_whole("evaluation", 2, windows=windows)  # one has no spread
    if windows > available:
        raise UserError(f"evaluation: {windows} windows of {length} tokens asked for, {available} are held out")
    check_vocabulary(tokens, config.vocab_size)
    starts = np.linspace(0, available - 1, windows).astype(int) * length
    nats, sizes = [], []
    with progress("evaluating", windows) as bar:
        for first in range(0, windows, batch):
            chosen = starts[first : first + batch]
            window = np.stack([tokens[start : start + length + 1] for start in chosen]).astype(np.int32)
            padded = np.resize(window, (batch, length + 1))  # one program for the last, shorter batch too
            nats.extend(np.asarray(_nats_per_window(params, padded, config))[: len(chosen)])
            sizes.extend(byte_lengths[window[:, 1:]].sum(axis=1))
            bar.advance(len(chosen))
    found, error = ratio(np.array(nats, np.float64), np.array(sizes, np.float64))
    return Bits(found / math.log(2), error / math.log(2), windows * length, int(sum(sizes)))


def as_bf16(params: Params) -> Params:
    """Weights rounded to BF16, as a BF16 checkpoint would store them, in float32 arrays."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)


def as_mxfp4(params: Params, rule: str = "even") -> Params:
    """The same with the experts rounded to MXFP4."""
    return quantize_experts(as_bf16(params), rule)


def as_calibrated(params: Params, config: ModelConfig, data: Path) -> Params:
    """The same with the experts rounded to MXFP4 for what the corpus' training text makes of them."""
    windows_NT = spaced_windows(load_tokens(data, "train"), _CALIBRATION_WINDOW, _CALIBRATION_WINDOWS)
    return expand(calibrate(config, as_bf16(params), windows_NT).params)


def compare_qat(run: Path, data: Path, windows: int) -> dict[str, Any]:
    """Bits per byte of a run with QAT on its corpus: in BF16; rounded to MXFP4 by each rule, calibrated, and with what
    QAT learnt.
    """
    check_tokenizer(run, data / TOKENIZER)
    heldout = heldout_of(data)
    config, train = read_settings(run)
    state = latest_state(run, config, train)
    if not isinstance(state, QatState):
        raise UserError(f"--run {run} was trained without QAT; expected a run of `train.py anneal --qat`")
    arms = {
        "BF16": as_bf16(state.masters.params),
        "MXFP4, rounded after training": as_mxfp4(state.masters.params),
        "MXFP4, rule floor": as_mxfp4(state.masters.params, "floor"),
        "MXFP4, rule ceil6": as_mxfp4(state.masters.params, "ceil6"),
        "MXFP4, calibrated": as_calibrated(state.masters.params, config, data),
        "MXFP4, after QAT": as_mxfp4(state.params),
    }
    record: dict[str, Any] = {}
    for name, params in arms.items():
        found = bits_per_byte(params, config, *heldout, windows)
        record[name] = {**dataclasses.asdict(found), "step": int(state.step)}
    best, rounded, *_, calibrated, trained = (record[name]["bits_per_byte"] for name in arms)
    record["QAT above BF16, percent"] = 100 * (trained / best - 1)
    record["rounding loss recovered, percent"] = 100 * (rounded - trained) / (rounded - best)
    record["rounding loss recovered by calibration, percent"] = 100 * (rounded - calibrated) / (rounded - best)
    return record


def heldout_of(data: Path, checkpoint: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Held-out tokens of a corpus, cut by the tokenizer of `checkpoint`, and the bytes each token id stands for."""
    if checkpoint:
        check_same_tokenizer(checkpoint, data)
    tokens = load_tokens(data, "heldout")
    lengths = np.array(Tokenizer.load(data / TOKENIZER).byte_lengths())
    check_vocabulary(tokens, len(lengths))
    return tokens, lengths
