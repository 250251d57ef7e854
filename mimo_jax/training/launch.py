"""Starts a run, or goes on with it from its last save: pretraining, annealing, a drafter. Each ends with a record."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mimo_jax.checkpoint import orbax
from mimo_jax.config.model import ModelConfig
from mimo_jax.config.presets import preset
from mimo_jax.errors import UserError
from mimo_jax.loading import load_dense, load_drafter
from mimo_jax.sharding import check_rows, place, shape_of
from mimo_jax.training import drafter, qat, run
from mimo_jax.training.corpus import TOKENIZER, check_same_tokenizer, identity, load_tokens
from mimo_jax.training.pretraining import TrainConfig, init_state
from mimo_jax.training.run import SAVE_EVERY
from mimo_jax.training.self_distillation import load_texts


@dataclasses.dataclass(frozen=True)
class Launch:
    """Where a run lives, the corpus it reads, the update it goes to, the mesh it runs on (None: one device), and after
    how many updates it is saved.
    """

    run: Path
    data: Path
    last_step: int
    mesh: Mesh | None = None
    save_every: int = SAVE_EVERY


def pretrain(launch: Launch, train: TrainConfig, preset_name: str, start: str | None, dtype: str) -> dict[str, Any]:
    """At a constant rate, from the random weights of a preset or from the checkpoint folder `start`."""
    if start:
        check_same_tokenizer(Path(start), launch.data)
        model = load_dense(Path(start), dtype)
        config, params = model.config, model.params
    else:
        config, params = dataclasses.replace(preset(preset_name), dtype=dtype), None
    settings = run.settings_of(config, train, start=start, corpus=identity(launch.data))
    return _on_corpus(launch, config, train, lambda: init_state(config, train, params), settings)


def anneal(launch: Launch, start: Path, has_qat: bool, **changes: Any) -> dict[str, Any]:
    """Continues the run `start` while the rate falls to zero over `launch.last_step` updates.

    `changes` replace fields of its `TrainConfig` where they are not None.
    """
    config, base = run.read_settings(start)
    state = run.latest_state(start, config, base)
    if isinstance(state, qat.QatState):
        raise UserError(f"--start {start} is a run with QAT, which ends a training; start from one without")
    first, steps = int(state.step), launch.last_step
    changed = {field: value for field, value in changes.items() if value is not None}
    train = dataclasses.replace(base, decay_start=first, decay_steps=steps, qat=has_qat, **changed)
    launch = dataclasses.replace(launch, last_step=first + steps)
    run.check_tokenizer(start, launch.data / TOKENIZER)
    settings = run.settings_of(config, train, start=start.name, corpus=identity(launch.data))
    return _on_corpus(launch, config, train, lambda: qat.begin(state, train) if has_qat else state, settings)


def train_drafter(
    launch: Launch,
    model_directory: Path,
    texts_directory: Path,
    train: drafter.DraftTrainConfig,
    geometry: drafter.Geometry,
    start: str | None,
) -> dict[str, Any]:
    """A drafter for the checkpoint at `model_directory`, of a `geometry` or from the `dflash` folder `start`."""
    model, texts = load_dense(model_directory, mesh=launch.mesh), load_texts(texts_directory)
    if train.kind == "chain" and (geometry.bias_rank or geometry.lookup):
        raise UserError("drafter: a chain has neither --bias-rank nor --lookup; it sees the tokens drafted before")
    if start and train.kind == "chain":
        config, params = drafter.as_chain(*load_drafter(model.config, Path(start)))
    elif start:
        config, params = drafter.extended(*load_drafter(model.config, Path(start)), geometry, train.seed)
    else:
        config, params = drafter.drafter_for(model.config, model.tokenizer, geometry), None
    check_rows(train.batch, launch.mesh, "sequences of a batch")
    update = drafter.training_update(texts, load_tokens(launch.data, "train"), model, config, train)
    if train.human_share:
        check_same_tokenizer(model_directory, launch.data)
    settings = run.settings_of(config, train, start=start, corpus=identity(launch.data))
    tokens_per_step = train.batch * texts.tokens.shape[1]
    return go(launch, settings, lambda: drafter.init_state(config, train, params), update, tokens_per_step)


def _on_corpus(
    launch: Launch, config: ModelConfig, train: TrainConfig, fresh_state: Callable[[], Any], settings: dict[str, Any]
) -> dict[str, Any]:
    if launch.mesh is not None:
        shape_of(launch.mesh).check_divides(config)
    check_rows(train.batch, launch.mesh, "sequences of a batch")
    check_rows(train.mtp_rows, launch.mesh, "sequences of a batch that train the MTP layers")
    update = run.pretraining_update(load_tokens(launch.data, "train"), config, train, launch.mesh)
    return go(launch, settings, fresh_state, update, train.batch * train.length)


def go(
    launch: Launch,
    settings: dict[str, Any],
    fresh_state: Callable[[], Any],
    update: run.Update[Any],
    tokens_per_step: int,
) -> dict[str, Any]:
    """The last line of the run's log, and where it was resumed; of the first process."""
    with run.only_trainer(launch.run):
        run.prepare(launch.run, settings)
        resumed = orbax.steps(launch.run / "checkpoints")
        state = run.restore(launch.run, fresh_state, launch.mesh) if resumed else place(fresh_state(), launch.mesh)
        with jax.set_mesh(launch.mesh) if launch.mesh is not None else contextlib.nullcontext():
            run.train_until(launch.run, state, launch.last_step, update, tokens_per_step, launch.save_every)
    if jax.process_index():
        return {}
    if importlib.util.find_spec("matplotlib"):
        run.plot_losses([launch.run], launch.run / "loss.png")
    else:
        print("no loss.png: it needs the `plots` extra (pip install -e '.[plots]')", file=sys.stderr)
    last = run.read_log(launch.run)[-1]
    return {"run": str(launch.run), "resumed_at": resumed[-1] if resumed else 0, **last}
