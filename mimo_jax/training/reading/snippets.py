"""Pieces of code small enough for a picture, from the tokens of a corpus."""

from __future__ import annotations

import dataclasses

import numpy as np

from mimo_jax.tokenizer import END_OF_TEXT, Tokenizer

CHARACTERS = "".join(map(chr, range(32, 127)))  # that are drawn
_WINDOW = 512  # tokens that a snippet is looked for in


@dataclasses.dataclass(frozen=True)
class Shape:
    """How large a snippet may be."""

    least_lines: int
    most_lines: int
    columns: int = 40


def snippet(tokens: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator, shape: Shape) -> list[str]:
    """Lines that follow each other in one file, without the indentation that all of them share. Longer lines are cut at
    the last column, as windows cut them; only printable ASCII is taken, with at least half a line's worth of it.
    """
    while True:
        first = int(rng.integers(0, len(tokens) - _WINDOW))
        text = tokenizer.decode(tokens[first : first + _WINDOW].tolist())
        lines = text.split(END_OF_TEXT)[0].split("\n")[1:-1]  # the first and the last may be parts
        begin = int(rng.integers(0, max(1, len(lines))))
        count = int(rng.integers(shape.least_lines, shape.most_lines + 1))
        found = [line.expandtabs(4).rstrip() for line in lines[begin : begin + count]]
        found = _fitted(found, shape.columns)
        is_drawn = all(set(line) <= set(CHARACTERS) for line in found)
        if is_drawn and not _is_table(found) and sum(map(len, found)) >= shape.columns // 2:
            return found


def _is_table(lines: list[str]) -> bool:
    """Codecs are long ones: all of their lines look alike."""
    return 2 * sum("0x" in line for line in lines) > len(lines)


def _fitted(lines: list[str], columns: int) -> list[str]:
    """Without blank lines at either end and without shared indentation; cut at the last column."""
    while lines and not lines[0]:
        lines = lines[1:]
    while lines and not lines[-1]:
        lines = lines[:-1]
    shared = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    return [line[shared:][:columns].rstrip() for line in lines]
