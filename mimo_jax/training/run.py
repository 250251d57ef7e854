"""A training run is a directory: `run.json` (what it is), `log.jsonl`, `loss.png`, `checkpoints/<step>`.

Batches depend only on (seed, step), so a run killed and started again continues with the same loss curve.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from mimo_jax.checkpoint import orbax
from mimo_jax.checkpoint.files.tensorfile import load_json, read_bytes
from mimo_jax.cli.plots import save_figure
from mimo_jax.cli.progress import progress
from mimo_jax.config.model import ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.files import exclusive, write_atomically
from mimo_jax.sharding import place_batch, shapes_on
from mimo_jax.training.corpus import batch_at, check_vocabulary
from mimo_jax.training.pretraining import TrainConfig, TrainState, init_state, train_step
from mimo_jax.training.qat import QatState, init_qat, qat_step

State = TypeVar("State", bound=Any)  # anything with a `step`
Config = TypeVar("Config")
Metrics = dict[str, jax.Array]
Update = Callable[[State, int], tuple[State, Metrics]]

SAVE_EVERY = 100
LOG_EVERY = 10
_MAX_SETTINGS_BYTES, _MAX_TOKENIZER_BYTES = 4_000_000, 1 << 28


def restore(run: Path, fresh_state: Callable[[], State], mesh: Mesh | None = None) -> State:
    """The newest complete state of a run, in the form of the one that `fresh_state` would make, on `mesh`."""
    abstract: Any = jax.eval_shape(fresh_state)
    if mesh is not None:
        abstract = shapes_on(abstract, mesh)
    return orbax.restore_latest(run / "checkpoints", abstract)


def latest_state(run: Path, config: ModelConfig, train: TrainConfig) -> TrainState | QatState:
    """The newest complete state of a pretraining run, with QAT or without."""
    return restore(run, lambda: (init_qat if train.qat else init_state)(config, train))


@contextmanager
def only_trainer(run: Path) -> Iterator[None]:
    """Keeps other processes from training the run until the block ends; of a distributed one, the first does so."""
    if jax.process_index():
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run / ".lock", f"{run}: is being trained by another process; stop that, or use another --run"):
        yield


def prepare(run: Path, settings: dict[str, Any]) -> None:
    """Creates the run's directory, or checks that the one there was started with the same settings."""
    path = run / "run.json"
    if path.exists():
        found = _read_json(path)
        for key, value in settings.items():
            if found.get(key) != value:
                raise UserError(f"{path}: {key}={found.get(key)!r}, this command has {value!r}; use another folder")
        return
    run.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        write_atomically(path, json.dumps(settings, indent=1).encode())


def train_until(
    run: Path, state: State, last_step: int, update: Update[State], tokens_per_step: int, save_every: int = SAVE_EVERY
) -> State:
    """Trains from `state.step` to `last_step`, logging every 10 steps and saving every `save_every` and at the end.

    `update` takes the state and the number of the step, from 0, and returns the new state and scalar metrics.
    """
    first, path = int(state.step) + 1, run / "log.jsonl"
    if jax.process_index() == 0:
        _truncate_log(path, first - 1)
    else:
        path = Path(os.devnull)  # one process writes
    with progress("training", last_step, done=first - 1) as bar, path.open("a") as log:
        started = time.perf_counter()
        for step in range(first, last_step + 1):
            state, metrics = update(state, step - 1)
            if step % LOG_EVERY == 0 or step == last_step:
                metrics = {name: round(float(value), 5) for name, value in jax.device_get(metrics).items()}
                _check_finite(run, step, metrics)
                speed = LOG_EVERY * tokens_per_step / (time.perf_counter() - started)
                log.write(json.dumps({"step": step, **metrics, "tokens_per_second": round(speed)}) + "\n")
                log.flush()
                bar.describe(f"loss {metrics['loss']:.3f}  {speed:,.0f} tokens/s")
                started = time.perf_counter()
            bar.advance()
            if step % save_every == 0 or step == last_step:
                orbax.save_step(run / "checkpoints", step, state)
    return state


def _check_finite(run: Path, step: int, metrics: dict[str, float]) -> None:
    """Weights that have become NaN would be saved in place of good ones."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise UserError(
                f"{run}: {name} is {metrics[name]} at step {step}; it is not saved. Lower --rate in another --run"
            )


def pretraining_update(
    tokens: np.ndarray, config: ModelConfig, train: TrainConfig, mesh: Mesh | None = None
) -> Update[Any]:
    """The update of `train_until` for pretraining and QAT on a corpus' tokens."""
    step_fn = qat_step if train.qat else train_step
    batch_at(tokens, 0, train.batch, train.length, train.seed)  # raises where the corpus is too small
    check_vocabulary(tokens, config.vocab_size)

    def update(state: Any, step: int) -> tuple[Any, Metrics]:
        batch = batch_at(tokens, step, train.batch, train.length, train.seed)
        return step_fn(state, place_batch(batch, mesh), config, train)

    return update


def _truncate_log(path: Path, step: int) -> None:
    """Drops what a killed run logged after its last save, so that the curve has no doubled points."""
    if path.exists():
        text = path.read_text(errors="surrogateescape")
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]
        kept = [line for line in lines if _row(line, path)["step"] <= step]
        write_atomically(path, "".join(kept).encode())


def _row(line: str, path: Path) -> dict[str, Any]:
    """One line of a log."""
    row = load_json(line.encode("utf-8", "surrogateescape"), str(path))
    if not all(isinstance(row.get(key), int | float) for key in ("step", "loss")):
        raise UserError(f"{path}: a line without step and loss; it was not written by a training run")
    return row


def read_log(run: Path) -> list[dict[str, Any]]:
    """What a run has logged, at least one row."""
    path = run / "log.jsonl"
    rows = [_row(line, path) for line in path.read_text(errors="surrogateescape").splitlines()]
    if not rows:
        raise UserError(f"{path}: empty; give the run more --steps")
    return rows


def plot_losses(runs: list[Path], out: Path) -> None:
    """Loss over steps of one or more runs, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for run in runs:
        rows = read_log(run)
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], label=run.name, linewidth=1)
    axis.set(xlabel="step", ylabel="training loss (nats per token)")
    axis.legend()
    save_figure(figure, out)


def _read_json(path: Path) -> dict[str, Any]:
    return load_json(read_bytes(path, _MAX_SETTINGS_BYTES), str(path))


def settings_of(model: Any, train: Any, **more: Any) -> dict[str, Any]:
    """What identifies a run, as JSON values: the config dataclasses of what is trained, and how."""
    return json.loads(json.dumps({"model": dataclasses.asdict(model), "train": dataclasses.asdict(train), **more}))


def all_settings(run: Path) -> dict[str, Any]:
    """What `prepare` was given when the run began."""
    if not (run / "run.json").is_file():
        raise UserError(f"{run}: not a run directory; expected run.json")
    return _read_json(run / "run.json")


def check_tokenizer(run: Path, tokenizer: Path) -> None:
    """Ids mean what the tokenizer of the run's corpus says; a corpus that was built again may have another."""
    learnt = (all_settings(run).get("corpus") or {}).get("tokenizer")
    if learnt and learnt != hashlib.sha256(read_bytes(tokenizer, _MAX_TOKENIZER_BYTES)).hexdigest():
        raise UserError(
            f"{tokenizer}: not the tokenizer that {run} was trained with; give the --data it was trained on"
        )


def configs_of(run: Path, model_kind: Callable[..., Any], train_kind: Callable[..., Any]) -> tuple[Any, Any]:
    """The two configs a run was started with."""
    with _of_this_version(run):
        given = all_settings(run)["model"].items()
        model = {key: tuple(value) if isinstance(value, list) else value for key, value in given}
        return model_kind(**model), train_kind(**all_settings(run)["train"])


def train_config_of(run: Path, kind: Callable[..., Config]) -> Config:
    """How a run was trained, which must be a run of this kind."""
    with _of_this_version(run):
        return kind(**all_settings(run)["train"])


@contextmanager
def _of_this_version(run: Path) -> Iterator[None]:
    try:
        yield
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{run / 'run.json'}: written by another version ({error})") from None


def read_settings(run: Path) -> tuple[ModelConfig, TrainConfig]:
    """The configs a pretraining run was started with."""
    return configs_of(run, ModelConfig, TrainConfig)
