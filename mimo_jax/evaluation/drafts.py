"""What pays on this machine: all that can draft for a checkpoint beside plain decoding, on texts of two kinds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mimo_jax.decode.sampling import Strategy
from mimo_jax.errors import UserError
from mimo_jax.evaluation.acceptance import prompts_of
from mimo_jax.evaluation.speed import Record, speculation
from mimo_jax.loading import DRAFTS, Model, load
from mimo_jax.tokenizer import Tokenizer

PIECE_TOKENS = 128  # of text in a prompt
BEGUN_TOKENS = 24  # of the same once more
OWN_TEXTS = sorted(Path(__file__).parent.glob("*.py"))  # that are there wherever this is


def models_of(directory: Path) -> dict[str, Model]:
    """ "plain", and the same model with whatever can draft for it; the reason of what cannot is said."""
    plain = load(directory, draft="none")
    models = {"plain": plain}
    for name in DRAFTS.keys() - {"none"}:
        try:
            models[name] = DRAFTS[name](plain, directory)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return models


def kinds_of_prompts(tokenizer: Tokenizer, texts: Sequence[Path], count: int) -> dict[str, list[list[int]]]:
    """`count` prompts of each kind: pieces to go on with, and pieces after which the same begins again, as where a text
    is handed over to be edited.
    """
    tokens = tokenizer.encode("\n".join(map(_read, texts)), literal=True)
    pieces, gap = prompts_of(np.array(tokens), count, PIECE_TOKENS), tokenizer.encode("\n\n\n")
    return {"going on": pieces, "editing": [[*piece, *gap, *piece[:BEGUN_TOKENS]] for piece in pieces]}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 at byte {error.start}") from None


def compare(
    models: dict[str, Model], kinds: dict[str, list[list[int]]], strategies: dict[str, Strategy], max_tokens: int
) -> Record:
    """`speed.speculation` for every kind of prompt and every strategy, by the names of both, with the advice."""
    record: Record = {}
    for kind, prompts in kinds.items():
        for name, strategy in strategies.items():
            found = speculation(models, prompts, strategy, max_tokens=max_tokens)
            record[f"{kind}, {name}"] = {"advice": advice(found), **found}
    return record


def advice(found: Record) -> str:
    """The fastest of those that are faster than plain decoding for certain, or none."""
    paying = [name for name, row in found.items() if row["speedup"] - row["speedup_half_width"] > 1]
    return max(paying, key=lambda name: found[name]["speedup"], default="none")
