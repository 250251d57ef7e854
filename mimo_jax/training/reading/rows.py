"""What each row of a picture is to say: the tokens of the picture's text that begin in its square. Both sides learn it,
the tower to put it there and the text model to write it down, and neither needs the other for that.

A row says a token as the text model hears it in text, by the token's embedding, and that it is a row, by that of the
placeholder for images: without it, the text model copies from text, too. Of several tokens the first is the loudest.
(One token per row, and the others in the next free ones, was beyond a tower: it has to count along the line.)
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
VOLUMES = (1.0, 0.8, 0.6)  # of the first, the second, the third token of a row


def said(
    ids: Sequence[int], tokenizer: Tokenizer, text: str, grid: Grid, rows: int, columns: int
) -> Int[np.ndarray, "R N"] | None:
    """The tokens of each of `rows` x `columns` squares, then `SILENT`; None where one of them has too many.

    `ids` spell `text`, which is ASCII: each of them has characters of its own.
    """
    found, counts, place = np.full((rows * columns, len(VOLUMES)), SILENT, np.int32), np.zeros(rows * columns, int), 0
    for token in ids:
        square = square_of(text, place, grid, rows, columns)
        if counts[square] == len(VOLUMES):
            return None
        found[square, counts[square]] = token
        counts[square] += 1
        place += len(tokenizer.decode([int(token)]))
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

    def rows(self, said_BRN: Int[Array, "B R N"], volumes_N: Float[Array, "... N"]) -> Float[Array, "B R D"]:
        """That say these tokens, so loud."""
        loud_BRN = jnp.where(said_BRN == SILENT, 0.0, volumes_N)
        return self.mark_D + jnp.einsum("brn,brnd->brd", loud_BRN, self.embed_CD[said_BRN])

    def heard(self, rows_BRD: Float[Array, "B R D"]) -> Float[Array, "B R C"]:
        """How loud each token is in a row: about 0, if the row does not say it."""
        return (rows_BRD - self.mark_D) @ self.embed_CD.T / jnp.mean(jnp.sum(self.embed_CD**2, axis=-1))
