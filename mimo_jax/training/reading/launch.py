"""Starts the stages of a model that reads, goes on with them, and writes what comes of them."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.checkpoint.convert import carried_files
from mimo_jax.checkpoint.export import write_checkpoint
from mimo_jax.checkpoint.read import read
from mimo_jax.config.model import ModelConfig
from mimo_jax.config.towers import MEDIA_TOKENS, MediaConfig, VisionConfig
from mimo_jax.loading import Model, load_dense
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training import run
from mimo_jax.training.ahead import Ahead
from mimo_jax.training.corpus import batch_at, check_same_tokenizer, check_vocabulary, identity, load_tokens
from mimo_jax.training.launch import Launch, go
from mimo_jax.training.pretraining import TrainState
from mimo_jax.training.reading.characters import CharacterConfig, character_step, init_characters
from mimo_jax.training.reading.examples import Batch, Reader, batches
from mimo_jax.training.reading.fonts import TRAINED, font_file
from mimo_jax.training.reading.joining import JoinConfig, Lesson, init_join, join_step, merged, transcripts

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
    assert config.vision is not None and config.media is not None
    files = tuple(font_file(name, fonts) for name in TRAINED)
    return Reader(tokens, tokenizer, files, config.vision, config.media)


def train_characters(
    launch: Launch,
    model: Path,
    fonts: Path | None,
    train: CharacterConfig,
    start: Path | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """The first stage, for the width of the model's text part; from random weights, or those of the run `start`.

    So many `workers`, processes, draw pictures; 0: this one.
    """
    config, reader = _reader(launch, model, load_dense(model), fonts)
    vision = reader.vision

    drawn = Ahead(partial(character_batch, reader, train), workers)

    def update(state: TrainState, step: int) -> tuple[TrainState, run.Metrics]:
        return character_step(state, drawn(step), vision, train)

    def fresh() -> TrainState:
        return init_characters(vision, train, None if start is None else _characters(start, vision).params)

    settings = run.settings_of(
        config, train, start=start and start.name, corpus=identity(launch.data), fonts=list(TRAINED)
    )
    return go(launch, settings, fresh, update, train.tokens)


def _characters(directory: Path, vision: VisionConfig) -> TrainState:
    """The newest state of a run of the first stage."""
    train = run.train_config_of(directory, CharacterConfig)
    return run.restore(directory, lambda: init_characters(vision, train))


def character_batch(reader: Reader, train: CharacterConfig, step: int) -> Batch:
    """What a step of the first stage learns from."""
    return next(batches(reader, train.tokens, train.seed, step))[0]


def train_join(
    launch: Launch, model: Path, start: Path, fonts: Path | None, train: JoinConfig, workers: int = 0
) -> dict[str, Any]:
    """The second stage, from the tower of the run `start`."""
    held = load_dense(model)
    config, reader = _reader(launch, model, held, fonts)
    text = {name: part for name, part in held.params.items() if name != "mtp"}
    tower = _characters(start, reader.vision).params["vision"]

    drawn = Ahead(partial(lesson, config, reader, train), workers)

    def update(state: TrainState, step: int) -> tuple[TrainState, run.Metrics]:
        return join_step(state, text, drawn(step), config, train)

    def fresh() -> TrainState:
        return init_join(text, tower, train)

    settings = run.settings_of(config, train, start=start.name, corpus=identity(launch.data), fonts=list(TRAINED))
    return go(launch, settings, fresh, update, train.rows + train.windows * train.length)


def lesson(config: ModelConfig, reader: Reader, train: JoinConfig, step: int) -> Lesson:
    """What a step of the second stage learns from."""
    batch, found = next(batches(reader, train.rows, train.seed, step, train.sizes_at(step)))
    window = batch_at(reader.tokens, step, train.windows, train.length, train.seed)
    return Lesson(batch, transcripts(found, config, reader.tokenizer, batch.size), window)


def export_seeing(directory: Path, model: Path, out: Path) -> dict[str, Any]:
    """The checkpoint `model` with the tower of a finished run, and with what its text part has learnt.

    All other weights keep their bits.
    """
    train, dense = run.train_config_of(directory, JoinConfig), load_dense(model)
    config = seeing(dense.config, dense.tokenizer)
    vision = config.vision
    assert vision is not None

    def fresh() -> TrainState:
        return init_join(dense.params, init_characters(vision, CharacterConfig(1)).params["vision"], train)

    state, held = run.restore(directory, fresh), read(model)
    params = {**merged(held.params, state.params), "vision": state.params["vision"]}
    config = dataclasses.replace(config, dtype=held.config.dtype)
    write_checkpoint(out, config, jax.device_get(params), carried_files(model))
    return {"checkpoint": str(out), "step": int(state.step)}


def _reader(launch: Launch, directory: Path, model: Model, fonts: Path | None) -> tuple[ModelConfig, Reader]:
    """The model's config with a tower, and pictures of the corpus."""
    check_same_tokenizer(directory, launch.data)
    tokens = load_tokens(launch.data, "train")
    check_vocabulary(tokens, model.config.vocab_size)
    config = seeing(model.config, model.tokenizer)
    return config, reader_of(config, model.tokenizer, tokens, fonts)
