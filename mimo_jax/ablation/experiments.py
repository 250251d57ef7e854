"""What a study can run: settings with what they may be, metrics, and the function that makes one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mimo_jax import loading
from mimo_jax.config.model import MAX_BLOCK
from mimo_jax.decode.verify import RULES
from mimo_jax.errors import UserError, check_real, check_whole
from mimo_jax.training.drafter import LOSSES
from pallas_kernels.mxfp4 import SCALE_RULES

Metrics = dict[str, float]
# (settings, seed, a folder that the runs of a study share) -> metrics
Run = Callable[[dict[str, Any], int, Path], Metrics]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values."""

    default: Any
    values: tuple[Any, ...]

    def check(self, name: str, value: Any) -> None:
        if not any(value == known and type(value) is type(known) for known in self.values):
            raise UserError(f"study: {name}={value!r} must be one of {', '.join(map(str, self.values))}")


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number in a range."""

    default: int
    lowest: int
    highest: int

    def check(self, name: str, value: Any) -> None:
        check_whole("study", self.lowest, self.highest, **{name: value})


@dataclasses.dataclass(frozen=True)
class Real:
    """A number in a range."""

    default: float
    lowest: float
    highest: float

    def check(self, name: str, value: Any) -> None:
        check_real("study", self.lowest, self.highest, **{name: value})


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that must be there; of a checkpoint, or the word for the bundled one."""

    default: str
    or_bundled: bool = False

    def check(self, name: str, value: Any) -> None:
        if self.or_bundled and value == BUNDLED:
            return
        if not isinstance(value, str) or not Path(value).is_dir():
            raise UserError(f"study: {name}={value!r} is no folder" + _HINTS.get(name, ""))


_HINTS = {"data": "; `scripts/train.py corpus` makes one", "model": "; expected a checkpoint directory"}
BUNDLED = "bundled"  # in place of a folder
_DATA = Folder("runs/corpus")  # a corpus that was cut by the model's tokenizer
_MODEL = Folder(BUNDLED, or_bundled=True)


def checkpoint_of(settings: Mapping[str, Any]) -> Path:
    """The folder that the setting `model` names."""
    return loading.BUNDLED if settings["model"] == BUNDLED else Path(settings["model"])


@dataclasses.dataclass(frozen=True)
class Experiment:
    """`module` holds `run`, and may hold `check` for what settings must be together."""

    about: str
    module: str
    rules: Mapping[str, Any]
    metrics: Mapping[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """Each with its default."""
        return {name: rule.default for name, rule in self.rules.items()}

    def check(self, given: Mapping[str, Any]) -> None:
        """Raises, before anything runs, where settings cannot be run."""
        values = {**self.settings, **given}
        for name, value in values.items():
            self.rules[name].check(name, value)
        check = getattr(self._home, "check", None)
        if check is not None:
            check(values)

    @property
    def run(self) -> Run:
        return self._home.run

    @property
    def _home(self) -> Any:
        return import_module(f"mimo_jax.ablation.{self.module}")


EXPERIMENTS = {
    "rounding": Experiment(
        "a small model trained from random weights, its experts then rounded to MXFP4, with or without QAT",
        "rounding",
        {
            "data": _DATA,
            "rule": Choice("even", SCALE_RULES),
            "qat": Choice(False, (False, True)),
            "width": Whole(128, 64, 1024),
            "steps": Whole(300, 1, 10**6),
            "descent": Whole(100, 1, 10**6),  # steps on the way to rate zero; after them as many with QAT, or without
            "batch": Whole(8, 1, 1024),
            "windows": Whole(64, 2, 10**6),
        },
        {
            "bits_per_byte": "held-out bits per byte of the rounded model",
            "loss": "the same above its own masters, in percent",
        },
    ),
    "drafter": Experiment(
        "a drafter trained from random weights on text of a checkpoint",
        "drafter",
        {
            "data": _DATA,
            "model": _MODEL,
            "loss": Choice("soft", tuple(LOSSES)),
            "layers": Whole(2, 1, 16),
            "window": Whole(128, 8, 4096),
            "block_size": Whole(8, 2, MAX_BLOCK),
            "steps": Whole(200, 1, 10**6),
            "batch": Whole(8, 1, 1024),
            "texts": Whole(512, 1, 10**6),  # of the checkpoint, that it learns from
            "prompts": Whole(40, 2, 10**5),
            "temperature": Real(0.0, 0, 10),
        },
        {"tokens_per_round": "on held-out prompts", "first_accepted": "share of rounds whose first draft is accepted"},
    ),
    "decoding": Experiment(
        "a checkpoint with its own drafter, on held-out prompts",
        "decoding",
        {
            "data": _DATA,
            "model": _MODEL,
            "rule": Choice("block", RULES),
            "block_size": Whole(8, 2, MAX_BLOCK),
            "temperature": Real(1.0, 0, 10),
            "prompts": Whole(40, 2, 10**5),
            "tokens": Whole(48, 1, 10**5),
        },
        {
            "tokens_per_round": "on held-out prompts",
            "tokens_per_second": "the time of this machine; runs one after the other",
        },
    ),
    "target": Experiment(
        "a checkpoint changed at inference",
        "target",
        {
            "data": _DATA,
            "model": _MODEL,
            "router": Choice("float32", ("float32", "bfloat16", "float8_e4m3fn")),
            "experts_per_token": Whole(2, 1, 1024),
            "windows": Whole(64, 2, 10**6),
        },
        {"bits_per_byte": "held-out"},
    ),
}
