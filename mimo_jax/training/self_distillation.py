"""Text that the target writes itself, which its drafter learns from (self-distillation).

Every chunk is one file and depends only on target, corpus, settings and its number, so a run that was killed goes on
where it stopped. `run.json` beside the chunks says what those are; texts of another target are not added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from mimo_jax.checkpoint.files.tensorfile import as_bytes
from mimo_jax.cli.progress import progress
from mimo_jax.decode import loop
from mimo_jax.decode.controls import alike
from mimo_jax.decode.sampling import Strategy, strategy_at
from mimo_jax.errors import UserError, check_real, check_whole
from mimo_jax.files import write_atomically
from mimo_jax.loading import Model
from mimo_jax.training import run
from mimo_jax.training.corpus import check_vocabulary


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
        numbers = {"rows": self.rows, "length": self.length, "shortest": self.shortest, "longest": self.longest}
        check_whole("self-distillation", 1, **numbers)
        check_whole("self-distillation", 0, 2**32 - 1, seed=self.seed)
        if not isinstance(self.temperatures, tuple) or not self.temperatures:
            raise UserError(f"self-distillation: temperatures={self.temperatures!r} must be some numbers")
        for temperature in self.temperatures:
            check_real("self-distillation", 0, 100, temperature=temperature)
        if not 1 <= self.shortest <= self.longest < self.length:
            raise UserError(
                f"self-distillation: shortest={self.shortest}, longest={self.longest}, length={self.length} must rise"
            )

    def strategy(self, chunk: int) -> Strategy:
        return strategy_at(self.temperatures[chunk % len(self.temperatures)])


def generate_chunk(model: Model, corpus: np.ndarray, settings: DistillationConfig, chunk: int) -> Texts:
    """The target's continuations of `rows` random places of the corpus."""
    rng = np.random.default_rng((settings.seed, chunk))
    places = rng.integers(0, len(corpus) - settings.longest, settings.rows)
    lengths = rng.integers(settings.shortest, settings.longest + 1, settings.rows)
    prompts = [corpus[place : place + size].astype(int).tolist() for place, size in zip(places, lengths)]
    controls = alike(settings.strategy(chunk), model.stop_ids, len(prompts))
    keys = loop.row_keys(rng.integers(0, 2**32, settings.rows).tolist())
    limits = np.asarray(settings.length - lengths, np.int32)
    capacity = loop.capacity_for(settings.length)
    caches = loop.prefill(model.decoder, model.weights, prompts, capacity)
    state = loop.start(model.decoder, *caches, limits, keys, controls)
    state = loop.decode(model.decoder, model.weights, state, controls, settings.length)
    rows = [prompt + written for prompt, written in zip(prompts, loop.progress(state)[0])]
    tokens = np.zeros((settings.rows, settings.length), np.uint16)
    for target, row in zip(tokens, rows):
        target[: len(row)] = row
    return Texts(tokens, lengths.astype(np.int32), np.array([len(row) for row in rows], np.int32))


def generate_texts(model: Model, corpus: np.ndarray, settings: DistillationConfig, out: Path, chunks: int) -> Texts:
    """Fills `out` up to `chunks` chunk files and returns them all."""
    _check_fits(model, corpus, settings)
    if any(out.glob("chunk-*.npz")) and not (out / "run.json").exists():
        raise UserError(f"{out}: has chunks, but no run.json that says what wrote them; use another folder")
    run.prepare(out, run.settings_of(model.config, settings, weights=_digest(model.params), corpus=_digest(corpus)))
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


def _digest(arrays: Any) -> str:
    """SHA-256 of a tree's numbers."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(arrays):
        digest.update(as_bytes(np.asarray(array)))
    return digest.hexdigest()


def _check_fits(model: Model, corpus: np.ndarray, settings: DistillationConfig) -> None:
    limit, vocab_size = model.config.max_position, model.config.vocab_size
    if settings.length > limit:
        raise UserError(f"self-distillation: length={settings.length}, but the target's context holds {limit} tokens")
    if len(corpus) <= settings.longest:
        raise UserError(f"corpus: {len(corpus)} tokens; prompts of up to {settings.longest} are taken from it")
    if vocab_size > 1 << 16:
        raise UserError(f"self-distillation: vocab_size={vocab_size}; texts are stored as 16-bit token ids")
    check_vocabulary(corpus, vocab_size)


def load_texts(directory: Path) -> Texts:
    """All chunks of a folder, in order."""
    paths = sorted(directory.glob("chunk-*.npz"))
    if not paths:
        raise UserError(
            f"{directory}: no chunk-*.npz; write some with `scripts/train.py self-distill --out {directory}`"
        )
    chunks = [_load_chunk(path) for path in paths]
    lengths = {chunk.tokens.shape[1] for chunk in chunks}
    if len(lengths) > 1:
        raise UserError(f"{directory}: chunks of {sorted(lengths)} tokens; only texts of one --length go together")
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *chunks)


def _load_chunk(path: Path) -> Texts:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            tokens, starts, ends = (stored[field.name] for field in dataclasses.fields(Texts))
    except (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a chunk of texts ({error}); delete it and give self-distill again") from None
    kinds = [(array.dtype, array.ndim) for array in (tokens, starts, ends)]
    if kinds != [(np.uint16, 2), (np.int32, 1), (np.int32, 1)] or not len(tokens) == len(starts) == len(ends) > 0:
        raise UserError(f"{path}: not a chunk of texts (found {kinds}); delete it and give self-distill again")
    return Texts(tokens, starts, ends)
