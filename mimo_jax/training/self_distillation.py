"""Text that the target writes itself, which its drafter learns from (self-distillation).

Every chunk is one file and depends only on (seed, chunk number), so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Int

from mimo_jax.cli.progress import progress
from mimo_jax.decode import loop
from mimo_jax.decode.sampling import Strategy, strategy_at
from mimo_jax.errors import UserError
from mimo_jax.files import write_atomically
from mimo_jax.loading import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows of token ids: a prompt up to `starts`, what the target wrote from there up to `ends`, then padding."""

    tokens: Int[Array | np.ndarray, "B T"]
    starts: Int[Array | np.ndarray, "B"]
    ends: Int[Array | np.ndarray, "B"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """How the target is asked. Chunks take the temperatures in turn; prompts have `shortest` to `longest` tokens."""

    length: int = 256
    rows: int = 128
    shortest: int = 8
    longest: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest < self.length:
            raise UserError(
                f"self-distillation: shortest={self.shortest}, longest={self.longest}, length={self.length} must rise"
            )
        if self.rows < 1 or not self.temperatures or min(self.temperatures) < 0:
            raise UserError(f"self-distillation: rows={self.rows}, temperatures={self.temperatures} must be positive")

    def strategy(self, chunk: int) -> Strategy:
        return strategy_at(self.temperatures[chunk % len(self.temperatures)])


def generate_chunk(model: Model, corpus: np.ndarray, settings: DistillationConfig, chunk: int) -> Texts:
    """The target's continuations of `rows` random places of the corpus."""
    rng = np.random.default_rng((settings.seed, chunk))
    places = rng.integers(0, len(corpus) - settings.longest, settings.rows)
    lengths = rng.integers(settings.shortest, settings.longest + 1, settings.rows)
    prompts = [corpus[place : place + size].astype(int).tolist() for place, size in zip(places, lengths)]
    strategy, stops = settings.strategy(chunk), loop.as_stops(model.stop_ids)
    keys = loop.row_keys(rng.integers(0, 2**32, settings.rows).tolist())
    limits = np.asarray(settings.length - lengths, np.int32)
    capacity = loop.capacity_for(settings.length)
    caches = loop.prefill(model.decoder, model.weights, prompts, capacity)
    state = loop.start(model.decoder, *caches, limits, keys, stops, strategy)
    state = loop.decode(model.decoder, model.weights, state, stops, strategy, settings.length)
    rows = [prompt + written for prompt, written in zip(prompts, loop.progress(state)[0])]
    tokens = np.zeros((settings.rows, settings.length), np.uint16)
    for target, row in zip(tokens, rows):
        target[: len(row)] = row
    return Texts(tokens, lengths.astype(np.int32), np.array([len(row) for row in rows], np.int32))


def generate_texts(model: Model, corpus: np.ndarray, settings: DistillationConfig, out: Path, chunks: int) -> Texts:
    """Fills `out` up to `chunks` chunk files and returns them all."""
    out.mkdir(parents=True, exist_ok=True)
    with progress("generating", chunks * settings.rows) as bar:
        for chunk in range(chunks):
            path = out / f"chunk-{chunk:05}.npz"
            if not path.exists():
                texts = generate_chunk(model, corpus, settings, chunk)
                buffer = io.BytesIO()
                np.savez(buffer, **dataclasses.asdict(texts))
                write_atomically(path, buffer.getvalue())
            bar.advance(settings.rows)
    return load_texts(out)


def load_texts(directory: Path) -> Texts:
    """All chunks of a folder, in order."""
    paths = sorted(directory.glob("chunk-*.npz"))
    if not paths:
        raise UserError(
            f"{directory}: no chunk-*.npz; write some with `scripts/train.py self-distill --out {directory}`"
        )
    chunks = [np.load(path) for path in paths]
    return Texts(*(np.concatenate([chunk[field.name] for chunk in chunks]) for field in dataclasses.fields(Texts)))
