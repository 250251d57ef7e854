"""The loop of a short training that nobody resumes: `training.run.train_until` without a folder."""

from __future__ import annotations

from collections.abc import Iterable

from mimo_jax.cli.progress import progress
from mimo_jax.training.run import State, Update


def trained(state: State, update: Update[State], steps: Iterable[int]) -> State:
    """The state after `update` has been made at each of the steps."""
    numbers = list(steps)
    with progress("training", len(numbers)) as bar:
        for step in numbers:
            state, _ = update(state, step)
            bar.advance()
    return state
