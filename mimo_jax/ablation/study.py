"""A study, as its TOML file describes it: an experiment, factors and their values, seeds, metrics, a budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimo_jax.ablation.experiments import EXPERIMENTS, Experiment
from mimo_jax.checkpoint.files.tensorfile import load_toml
from mimo_jax.errors import UserError, check_real, check_whole

_MAX_BYTES = 1 << 20
_NEEDED = ("title", "experiment", "factors", "seeds", "metrics", "minutes")
_OPTIONAL = ("base", "control", "crossed")
MOST_RUNS = 10_000

Arm = dict[str, Any]  # factor -> value


@dataclasses.dataclass(frozen=True)
class Study:
    """What is varied and what is measured. The control arm has the first value of each factor, unless it is named.

    Arms differ from the control in one factor; in a `crossed` study they are all combinations.
    """

    title: str
    experiment: str
    factors: Mapping[str, Sequence[Any]]
    seeds: Sequence[int]
    metrics: Sequence[str]
    minutes: float
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    control: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    crossed: bool = False

    def __post_init__(self) -> None:
        check_real("study", 0.01, 100_000, minutes=self.minutes)
        if self.experiment not in EXPERIMENTS:
            raise UserError(f"study: experiment={self.experiment!r} is unknown; known: {', '.join(EXPERIMENTS)}")
        self._check_names()
        for name, values in self.factors.items():
            if not isinstance(values, list) or len(values) < 2:
                raise UserError(f"study: factors.{name}={values!r} must be a list of two values or more")
        if not isinstance(self.seeds, list) or not self.seeds or len(set(map(str, self.seeds))) < len(self.seeds):
            raise UserError(f"study: seeds={self.seeds!r} must be a list of different whole numbers")
        check_whole("study", 0, 2**32 - 1, **{f"seeds[{index}]": seed for index, seed in enumerate(self.seeds)})
        for name, value in self.control.items():
            if value not in self.factors[name]:
                raise UserError(f"study: control.{name}={value!r} must be one of {self.factors[name]}")
        for arm in self.arms:
            self.what.check({**self.base, **arm})
        if len(self.arms) * len(self.seeds) > MOST_RUNS:
            raise UserError(f"study: {len(self.arms)} arms of {len(self.seeds)} seeds are more than {MOST_RUNS} runs")

    def _check_names(self) -> None:
        settings, metrics = self.what.settings, self.what.metrics
        for table in ("base", "factors", "control"):
            known = self.factors if table == "control" else settings
            for name in getattr(self, table):
                if name not in known:
                    raise UserError(f"study: {table}.{name} is unknown; known: {', '.join(known)}")
        if both := self.base.keys() & self.factors.keys():
            raise UserError(f"study: {min(both)} is both in base and in factors")
        if not self.factors:
            raise UserError("study: factors is empty; nothing is varied")
        if not isinstance(self.metrics, list) or not self.metrics:
            raise UserError(f"study: metrics={self.metrics!r} must be a list of {', '.join(metrics)}")
        for name in self.metrics:
            if name not in metrics:
                raise UserError(f"study: metric {name!r} does not exist; {self.experiment} has {', '.join(metrics)}")

    @property
    def what(self) -> Experiment:
        return EXPERIMENTS[self.experiment]

    @property
    def control_arm(self) -> Arm:
        return {name: self.control.get(name, values[0]) for name, values in self.factors.items()}

    @property
    def arms(self) -> list[Arm]:
        """The control first, each once."""
        if self.crossed:
            found = [dict(zip(self.factors, values)) for values in itertools.product(*self.factors.values())]
        else:
            found = [{**self.control_arm, name: value} for name, values in self.factors.items() for value in values]
        arms = [self.control_arm]
        for arm in found:
            if arm not in arms:
                arms.append(arm)
        return arms

    def settings_of(self, arm: Arm) -> dict[str, Any]:
        """Everything that a run of this arm is told, defaults included."""
        return {**self.what.settings, **self.base, **arm}


def read_study(path: Path) -> Study:
    """The study of a file; whatever is wrong with it is an error that names it."""
    values = load_toml(path, _MAX_BYTES)
    if missing := [name for name in _NEEDED if name not in values]:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    if unknown := [name for name in values if name not in (*_NEEDED, *_OPTIONAL)]:
        raise UserError(f"{path}: {unknown[0]} is unknown; known: {', '.join((*_NEEDED, *_OPTIONAL))}")
    for name in ("factors", "base", "control"):
        if not isinstance(values.get(name, {}), dict):
            raise UserError(f"{path}: {name}={values[name]!r} must be a table")
    try:
        return Study(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
