"""What each row of a picture is to say: one token of the picture's text, or nothing. Both sides learn it, the tower to
put it there and the text model to write it down, and neither needs the other for that.

A row says its token as the text model hears it in text, by the token's embedding, and that it is a row, by that of the
placeholder for images: without it, the text model copies from text, too. It is the row of the square in which the token
begins; or, where that has one already, the next row that has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Voice:
    """How rows say tokens: by embeddings, all made as long as they are on average, and by what every row says."""

    embed_CD: Float[Array, "C D"]
    mark_D: Float[Array, "D"]

    @classmethod
    def of(cls, embed_CD: Float[Array, "C D"], placeholder: int) -> Voice:
        """That of a text model's embeddings."""
        embed_CD = jnp.asarray(embed_CD, jnp.float32)
        norms_C1 = jnp.linalg.norm(embed_CD, axis=-1, keepdims=True)
        scaled_CD = embed_CD / norms_C1 * jnp.sqrt(jnp.mean(norms_C1**2))
        return cls(scaled_CD, scaled_CD[placeholder])

    def rows(self, said_BR: Int[Array, "B R"]) -> Float[Array, "B R D"]:
        """That say these tokens."""
        return self.mark_D + jnp.where(said_BR[..., None] == SILENT, 0.0, self.embed_CD[said_BR])

    def heard(self, rows_BRD: Float[Array, "B R D"]) -> Float[Array, "B R C"]:
        """How much of each token is in a row: 1 of what it says, about 0 of all else."""
        return (rows_BRD - self.mark_D) @ self.embed_CD.T / jnp.mean(jnp.sum(self.embed_CD**2, axis=-1))
