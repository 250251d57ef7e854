"""The text that a model is calibrated on: windows of tokens, evenly spaced over a file or all files of a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int

from mimo_jax.checkpoint.files.tensorfile import read_bytes
from mimo_jax.errors import UserError
from mimo_jax.tokenizer import Tokenizer

FEWEST_WINDOWS = 8
_MAX_BYTES = 1 << 27  # all of it is tokenised, though little becomes windows


def read_texts(path: Path) -> list[str]:
    """A file, or every file of a folder in the order of their names, but for those that are no UTF-8."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise UserError(f"{path}: no file and no folder of files; expected a text to calibrate on")
    if (size := sum(file.stat().st_size for file in files)) > _MAX_BYTES:
        raise UserError(f"{path}: {size:,} bytes; calibration reads {_MAX_BYTES:,} at most, so name a part of it")
    texts = [text for file in files if (text := _decoded(file))]
    if not texts:
        raise UserError(f"{path}: holds no UTF-8 text; expected a text to calibrate on")
    return texts


def _decoded(file: Path) -> str | None:
    try:
        return read_bytes(file, _MAX_BYTES).decode()
    except UnicodeDecodeError:
        return None


def windows_of(texts: list[str], tokenizer: Tokenizer, length: int, most: int, where: str) -> Int[np.ndarray, "N T"]:
    """`spaced_windows` of texts, one after the other; `where` begins the error if they are too short."""
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(texts)])
    if len(tokens) < (needed := FEWEST_WINDOWS * length):
        raise UserError(f"{where}: {len(tokens):,} tokens of text; calibration needs {needed:,} or more")
    return spaced_windows(tokens, length, most)


def spaced_windows(tokens: np.ndarray, length: int, most: int) -> Int[np.ndarray, "N T"]:
    """At most `most` windows of `length` tokens, evenly spaced; no token is in two of them."""
    available = len(tokens) // length
    starts = np.linspace(0, available - 1, min(available, most)).astype(int) * length
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)
