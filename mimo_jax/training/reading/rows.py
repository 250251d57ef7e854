"""What each row of a picture is to say: one token of the picture's text, or nothing. Both sides learn it, the tower to
put it there and the text model to write it down, and neither needs the other for that.

A row says its token as the text model hears it in text: by the token's embedding. It is the row of the square in which
the token begins; or, where that has one already, the next row that has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training.reading.pictures import Grid

SILENT = -1


def said(
    ids: Sequence[int], tokenizer: Tokenizer, text: str, grid: Grid, rows: int, columns: int
) -> Int[np.ndarray, "R"] | None:
    """The token of each of `rows` x `columns` squares, or `SILENT`; None where there is no room for all of them.

    `ids` spell `text`, which is ASCII: each of them has characters of its own.
    """
    found, free, place = np.full(rows * columns, SILENT, np.int32), 0, 0
    for token in ids:
        free = max(free, square_of(text, place, grid, rows, columns))
        if free == len(found):
            return None
        found[free] = token
        free, place = free + 1, place + len(tokenizer.decode([int(token)]))
    return found


def square_of(text: str, place: int, grid: Grid, rows: int, columns: int) -> int:
    """The square in which a character of the text has its centre; the end of a line is right of its last one."""
    begin = text.rfind("\n", 0, place) + 1
    x, y = grid.centre(text.count("\n", 0, place), place - begin)
    row, column = int(y * rows / grid.height), int(x * columns / grid.width)
    return row * columns + min(column, columns - 1)


def scaled(embed_CD: Float[np.ndarray, "C D"]) -> Float[np.ndarray, "C D"]:
    """Embeddings as rows say them: all of their root mean square, so that none is louder."""
    norms_C1 = np.linalg.norm(embed_CD, axis=-1, keepdims=True)
    return embed_CD / norms_C1 * np.sqrt(np.mean(norms_C1**2))
