"""Starts the stages of a model that reads, goes on with them, and writes what comes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoint.convert import carried_files
from mimo_jax.checkpoint.export import write_checkpoint
from mimo_jax.checkpoint.read import read
from mimo_jax.config.model import ModelConfig
from mimo_jax.config.towers import MEDIA_TOKENS, MediaConfig, VisionConfig
from mimo_jax.errors import UserError
from mimo_jax.loading import Model, load_dense
from mimo_jax.modeling.vision import init_vision
from mimo_jax.tokenizer import END_OF_TEXT, Tokenizer
from mimo_jax.training import run
from mimo_jax.training.ahead import Ahead
from mimo_jax.training.corpus import TOKENIZER, batch_at, check_same_tokenizer, check_vocabulary, identity, load_tokens
from mimo_jax.training.launch import Launch, go
from mimo_jax.training.pretraining import TrainState
from mimo_jax.training.reading import copying
from mimo_jax.training.reading.characters import CharacterConfig, character_step, init_characters
from mimo_jax.training.reading.copying import CopyConfig, LessonConfig, copy_step, init_copying, merged
from mimo_jax.training.reading.examples import Batch, Reader, batches
from mimo_jax.training.reading.fonts import TRAINED, font_file
from mimo_jax.training.reading.joining import JoinConfig, Lesson, init_join, join_step, joined, slipped
from mimo_jax.training.reading.rows import Voice
from mimo_jax.weights import Params

FIRST_UNUSED = 0xF5  # of the bytes that no UTF-8 text has: their tokens are free to stand for media


def seeing(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """`config` with a small vision tower, 0.8 million parameters, for pictures of up to 256 rows."""
    unused = (tokenizer.id_of(chr(FIRST_UNUSED + index)) for index in range(len(MEDIA_TOKENS)))
    limits = {"image_min_pixels": 1024, "image_max_pixels": 65_536}
    vision = VisionConfig(
        config.hidden_size,
        windows=(0, 1, 0, 0, -1),
        hidden_size=96,
        intermediate_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        patch=8,
        init_range=0.08,  # at 0.02 the first characters took three times as many steps
    )
    return dataclasses.replace(config, vision=vision, media=MediaConfig(**dict(zip(MEDIA_TOKENS, unused)), **limits))


def reader_of(config: ModelConfig, tokenizer: Tokenizer, tokens: np.ndarray, fonts: Path | None) -> Reader:
    """Pictures in all fonts that are not held out."""
    files = tuple(font_file(name, fonts) for name in TRAINED)
    return _reader(config, tokenizer, tokens, files)


def train_characters(
    launch: Launch,
    model: Path,
    fonts: Path | None,
    train: CharacterConfig,
    start: Path | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """A tower for the embeddings of `model`; from random weights, or those of the tower in the checkpoint `start`.

    So many `workers`, processes, draw pictures; 0: this one.
    """
    held = load_dense(model)
    config, tokens = _seeing(launch, model, held)
    reader, vision = reader_of(config, held.tokenizer, tokens, fonts), config.vision
    assert vision is not None
    tower = _eyes(start)[1] if start else None
    drawn, voice = Ahead(partial(character_batch, reader, train), workers), _voice(config, held)

    def update(state: TrainState, step: int) -> tuple[TrainState, run.Metrics]:
        return character_step(state, drawn(step), voice, vision, train)

    settings = _settings(launch, config, train, start, fonts=list(TRAINED))
    return go(launch, settings, lambda: init_characters(vision, train, tower), update, train.tokens)


def character_batch(reader: Reader, train: CharacterConfig, step: int) -> Batch:
    """What a step of it learns from."""
    return next(batches(reader, train.tokens, train.seed, step))[0]


def _eyes(checkpoint: Path) -> tuple[Params, Params]:
    """Its text model and its vision tower."""
    held = load_dense(checkpoint)
    if held.towers is None or held.towers.config.vision is None:
        raise UserError(f"--start {checkpoint}: has no vision tower to go on from")
    return held.params, jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), held.towers.params["vision"])


def train_copying(
    launch: Launch, model: Path, train: CopyConfig, start: Path | None = None, workers: int = 0
) -> dict[str, Any]:
    """The text part of `model` learns to write down what rows say; from the checkpoint `start`, if it has begun."""
    held = load_dense(model)
    config, tokens = _seeing(launch, model, held)
    text = jax.device_put(held.params)  # once, not with every step
    begun = load_dense(start).params if start else text
    reader, voice = _reader(config, held.tokenizer, tokens, ()), _voice(config, held)
    made = Ahead(partial(copying.lesson, config, reader, train, _windows(tokens, train)), workers)

    def update(state: TrainState, step: int) -> tuple[TrainState, run.Metrics]:
        return copy_step(state, text, made(step), voice, config, train)

    settings = _settings(launch, config, train, start)
    return go(launch, settings, lambda: init_copying(begun, train), update, train.tokens)


def train_join(
    launch: Launch, model: Path, start: Path, fonts: Path | None, train: JoinConfig, workers: int = 0
) -> dict[str, Any]:
    """Tower and text model of the checkpoint `start` learn together; `model` is what the text model was before."""
    held = load_dense(model)
    config, tokens = _seeing(launch, model, held)
    reader = reader_of(config, held.tokenizer, tokens, fonts)
    text = jax.device_put(held.params)  # once, not with every step
    copying_text, tower = _eyes(start)
    made = Ahead(partial(join_lesson, config, reader, train, _windows(tokens, train)), workers)

    def update(state: TrainState, step: int) -> tuple[TrainState, run.Metrics]:
        return join_step(state, text, made(step), config, train)

    settings = _settings(launch, config, train, start, fonts=list(TRAINED))
    return go(launch, settings, lambda: init_join(copying_text, tower, train), update, train.tokens)


def join_lesson(
    config: ModelConfig, reader: Reader, train: JoinConfig, windows: Callable[[int], np.ndarray], step: int
) -> Lesson:
    """What a step of it learns from."""
    batch, found = next(batches(reader, train.rows, train.seed, step))
    ids, counts = [each.ids for each in found], [each.count for each in found]
    told = copying.transcripts(ids, counts, batch.size, config, reader.tokenizer.id_of(END_OF_TEXT))
    return Lesson(batch, slipped(told, train.slips, np.random.default_rng((train.seed, step, 1))), windows(step))


def export_copying(directory: Path, model: Path, out: Path) -> dict[str, Any]:
    """The checkpoint `model` with what its text part learnt in a finished run. All other weights keep their bits."""
    train, dense = run.train_config_of(directory, CopyConfig), load_dense(model)
    state = run.restore(directory, lambda: init_copying(dense.params, train))
    held = read(model)
    return _written(out, model, held.config, merged(held.params, state.params), state)


def export_characters(directory: Path, model: Path, out: Path) -> dict[str, Any]:
    """The checkpoint `model` with the tower of a finished run beside it. All other weights keep their bits."""
    train, held = run.train_config_of(directory, CharacterConfig), read(model)
    config, vision = _with_tower(held.config, model)
    state = run.restore(directory, lambda: init_characters(vision, train))
    return _written(out, model, config, {**held.params, "vision": state.params["vision"]}, state)


def export_seeing(directory: Path, model: Path, out: Path) -> dict[str, Any]:
    """The checkpoint `model` with what learnt in a finished join. All other weights keep their bits."""
    train, held = run.train_config_of(directory, JoinConfig), read(model)
    config, vision = _with_tower(held.config, model)
    tower, text = init_vision(vision, jax.random.key(0)), load_dense(model).params
    state = run.restore(directory, lambda: init_join(text, tower, train))
    return _written(out, model, config, joined(held.params, state.params), state)


def _with_tower(config: ModelConfig, model: Path) -> tuple[ModelConfig, VisionConfig]:
    """The config of the files of `model` with a tower, and that tower's."""
    config = seeing(config, Tokenizer.load(model / TOKENIZER))
    assert config.vision is not None
    return config, config.vision


def _written(out: Path, model: Path, config: ModelConfig, params: Params, state: TrainState) -> dict[str, Any]:
    write_checkpoint(out, config, jax.device_get(params), carried_files(model))
    return {"checkpoint": str(out), "step": int(state.step)}


def _seeing(launch: Launch, directory: Path, model: Model) -> tuple[ModelConfig, np.ndarray]:
    """The model's config with a tower, and the corpus."""
    check_same_tokenizer(directory, launch.data)
    tokens = load_tokens(launch.data, "train")
    check_vocabulary(tokens, model.config.vocab_size)
    return seeing(model.config, model.tokenizer), tokens


def _reader(config: ModelConfig, tokenizer: Tokenizer, tokens: np.ndarray, files: tuple[Path, ...]) -> Reader:
    assert config.vision is not None and config.media is not None
    return Reader(tokens, tokenizer, files, config.vision, config.media)


def _windows(tokens: np.ndarray, train: LessonConfig) -> Callable[[int], np.ndarray]:
    """Plain text of a step."""
    return partial(batch_at, tokens, batch=train.windows, length=train.length, seed=train.seed)


def _voice(config: ModelConfig, model: Model) -> Voice:
    assert config.media is not None
    return Voice.of(model.params["embed"], config.media.image_token)


def _settings(launch: Launch, config: ModelConfig, train: Any, start: Path | None, **more: Any) -> dict[str, Any]:
    return run.settings_of(config, train, start=start and start.name, corpus=identity(launch.data), **more)
