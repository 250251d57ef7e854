"""Held-out bits per byte, and what rounding the experts to MXFP4 costs with and without QAT."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.config import ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.modeling.backbone import Backbone, Params
from mimo_jax.progress import progress
from mimo_jax.training.pretraining import cross_entropy
from mimo_jax.training.qat import quantize_experts


@dataclasses.dataclass(frozen=True)
class Bits:
    """Bits per byte over `tokens` held-out tokens standing for `size` bytes; `error` is one standard error."""

    bits_per_byte: float
    error: float
    tokens: int
    size: int


@partial(jax.jit, static_argnames="config")
def _nats_per_window(params: Params, window_BT: Int[Array, "B T+1"], config: ModelConfig) -> Float[Array, "B"]:
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
    if windows > available:
        raise UserError(f"evaluation: {windows} windows of {length} tokens asked for, {available} are held out")
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
    nats, sizes = np.array(nats, np.float64), np.array(sizes, np.float64)
    ratio = nats.sum() / sizes.sum()
    spread = np.std(nats - ratio * sizes, ddof=1) * math.sqrt(len(nats)) / sizes.sum()  # of a ratio estimator
    return Bits(ratio / math.log(2), spread / math.log(2), windows * length, int(sizes.sum()))


def as_bf16(params: Params) -> Params:
    """Weights rounded to BF16, as a BF16 checkpoint would store them, in float32 arrays."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)


def as_mxfp4(params: Params) -> Params:
    """The same with the experts rounded to MXFP4."""
    return quantize_experts(as_bf16(params))
