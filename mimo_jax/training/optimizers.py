"""Muon for matrices, AdamW for tables, norms and vectors; a warm-up, a plateau, a linear descent to zero."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mimo_jax.errors import check_real
from mimo_jax.weights.params import path_names, row_of

OPTIMIZERS = ("muon", "adamw")


def _is_muons(path) -> bool:
    """Whether the table of parameters gives the leaf to Muon; one that it does not know is an error."""
    row = row_of(path_names(path))
    if row is None:
        raise ValueError(f"{'/'.join(path_names(path))}: no row of weights.params")
    return row.optimizer == "muon"


def matrix_axes(params) -> Any:
    """Per leaf, Muon's (input, output) axes, or None for what AdamW updates. Stacks are sets of matrices [.., N, K]."""

    def axes(path, leaf):
        if not _is_muons(path):
            return None
        return MuonDimensionNumbers(reduction_axis=leaf.ndim - 1, output_axis=leaf.ndim - 2)

    return jax.tree_util.tree_map_with_path(axes, params)


def check_rate(where: str, peak: float) -> None:
    """Raises unless a learning rate could train anything: updates have the size of weights, and are float32."""
    check_real(where, 1e-12, 1.0, peak_rate=peak)


def learning_rate(peak: float, warmup: int, decay_start: int, decay_steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, constant until `decay_start`, then linear to zero over `decay_steps`."""
    pieces = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)]
    boundaries = [warmup]
    if decay_steps:
        pieces.append(optax.linear_schedule(peak, 0.0, decay_steps))
        boundaries.append(decay_start)
    return optax.join_schedules(pieces, boundaries)


def falling_rate(peak: float, warmup: int, steps: int, share: float) -> optax.Schedule:
    """The `learning_rate` of a run of `steps` updates, which falls to zero in the last `share` of them."""
    decay = int(steps * share)
    return learning_rate(peak, warmup, steps - decay, decay)


def make_optimizer(schedule: optax.Schedule, weight_decay: float, name: str = "muon") -> optax.GradientTransformation:
    """Gradients clipped to norm 1, then Muon scaled to AdamW's update size (0.2 RMS), so that both share one rate.

    With `name` "adamw" every leaf is AdamW's.
    """

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: _is_muons(path), params)

    rules = {
        "muon": lambda: muon(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            adam_b1=0.9,
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=matrix_axes,
        ),
        "adamw": lambda: optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=decayed),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), rules[name]())
