"""From a checkpoint whose experts are not in MXFP4 to one whose experts are, in the published layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.calibration.model import calibrate
from mimo_jax.calibration.texts import read_texts, windows_of
from mimo_jax.checkpoint.convert import carried_files, to_huggingface
from mimo_jax.checkpoint.huggingface import Checkpoint
from mimo_jax.config.model import PUBLISHED
from mimo_jax.errors import UserError
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.weights import Params, encode
from mimo_jax.weights.dtypes import DTYPES
from mimo_jax.weights.params import path_names, weights

TOKENIZER = "tokenizer.json"
WINDOW = 512  # tokens, unless the model's context is shorter


def quantize(source: Path, destination: Path, overwrite: bool = False) -> dict[str, Any]:
    """Rounds every expert weight to the nearest that its block can hold; the rest as by `to_huggingface`."""

    def unchanged(found: Checkpoint) -> Params:
        _check_unquantised(source, found)
        return found.params

    return to_huggingface(source, destination, overwrite, unchanged)


def quantize_calibrated(
    source: Path,
    destination: Path,
    text: Path,
    windows: int,
    overwrite: bool = False,
    files: Mapping[str, bytes | Path] | None = None,
) -> dict[str, Any]:
    """Rounds the experts so that their outputs change least on `windows` windows of a text; see `calibrate`.

    `files` go along with the weights instead of the source's own.
    """
    texts = read_texts(text)
    measured: dict[str, Any] = {}

    def calibrated(found: Checkpoint) -> Params:
        _check_unquantised(source, found)
        tokenizer = tokenizer_of(source)
        windows_NT = windows_of(texts, tokenizer, min(WINDOW, found.config.max_position), windows, str(text))
        if (largest := int(windows_NT.max())) >= found.config.vocab_size:
            raise UserError(f"{source}: its {TOKENIZER} gives token {largest}; vocab_size={found.config.vocab_size}")
        result = calibrate(found.config, _otherwise_as_published(found), windows_NT)
        measured.update(error=result.errors, tokens=result.tokens, fewest_tokens_of_an_expert=result.fewest_tokens)
        return result.params

    return {**to_huggingface(source, destination, overwrite, calibrated, files), **measured}


def _check_unquantised(source: Path, found: Checkpoint) -> None:
    if not any(found.config.moe_pattern):
        raise UserError(f"{source}: has no layer with experts, so nothing to round to MXFP4")
    if found.file_format.of("expert") == "mxfp4":
        raise UserError(f"{source}: its experts are in MXFP4 already; expected a checkpoint with BF16, F32 or FP8 ones")
    PUBLISHED.check_fits(found.config)


def tokenizer_of(source: Path) -> Tokenizer:
    """That of a checkpoint of any kind."""
    content = carried_files(source).get(TOKENIZER)
    if not isinstance(content, bytes):
        raise UserError(f"{source}: has no {TOKENIZER}, which calibration reads its text with")
    return Tokenizer.parse(content.decode(errors="replace"), f"{source / TOKENIZER}")


def _otherwise_as_published(found: Checkpoint) -> Params:
    """Parameters as they will be read from what is written, but for the experts, which are calibrated on those."""
    params = jax.tree.map(np.asarray, found.params)  # XLA divides by the scales of FP8 otherwise than NumPy does
    stored = {
        weight.path: encode(weight.of(params), weight.stored, DTYPES[weight.parts[0].dtype], weight.label)
        for weight in weights(found.config, PUBLISHED)
        if weight.row.kind != "expert"
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: stored.get(tuple(path_names(path)), leaf),
        params,
        is_leaf=lambda node: not isinstance(node, dict),
    )
