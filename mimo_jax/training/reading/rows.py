"""What each row of a picture is to say: the characters of its square, in as few tokens as spell them. Both sides learn
it, the tower to put it there and the text model to write it down, and neither needs the other for that.

A row says a token as the text model hears it in text, by the token's embedding, and that it is a row, by that of the
placeholder for images: without it, the text model copies from text, too. Of several tokens the first is the loudest.
(Tokens of the whole text, each in the row that it begins in, are beyond a small tower: where a word is cut depends on
all of it.)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
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
    lines: Sequence[str], tokenizer: Tokenizer, grid: Grid, rows: int, columns: int
) -> Int[np.ndarray, "R N"] | None:
    """The tokens of each of `rows` x `columns` squares, then `SILENT`; None where one of them has too many."""
    found = np.full((rows * columns, len(VOLUMES)), SILENT, np.int32)
    placed = [
        (square_of(line, column, grid, rows, columns), character)
        for line, text in enumerate(lines)
        for column, character in enumerate(text + "\n")
    ]
    for square, its in itertools.groupby(placed[:-1], key=lambda each: each[0]):
        ids = spelling("".join(character for _, character in its), tokenizer)
        if len(ids) > len(VOLUMES):
            return None
        found[square, : len(ids)] = ids
    return found


def transcript(said_RN: Int[np.ndarray, "R N"]) -> tuple[int, ...]:
    """What is said, row by row."""
    return tuple(said_RN[said_RN != SILENT].tolist())


@functools.lru_cache(maxsize=100_000)
def spelling(characters: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of some characters by themselves."""
    return tuple(tokenizer.encode(characters, literal=True))


def square_of(line: int, place: int, grid: Grid, rows: int, columns: int) -> int:
    """The square in which a character has its centre; the end of a line is right of its last, within the picture."""
    x, y = grid.centre(line, place)
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
