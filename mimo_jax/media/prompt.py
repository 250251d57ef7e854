"""A prompt with media: token ids, and beyond them ids that stand for rows of a tower.

With a vocabulary of C tokens, id C + r is row r of the prompt's own rows, see `modeling.backbone.MEDIA`. So a prompt is
cut into chunks, padded and counted as if it were text alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float

from mimo_jax.errors import UserError
from mimo_jax.media.rows import size_for

ROW = -1  # in `Shown.ids`
FEWEST_ROWS = 64  # of the smallest compiled size


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """A part as the prompt shows it: token ids, with ROW in the place of each of its rows.

    `compute` makes the rows, and `digest` is equal only where they are.
    """

    kind: str  # image, audio or video
    ids: tuple[int, ...]
    compute: Callable[[], Float[np.ndarray, "R D"]]
    digest: bytes

    @property
    def count(self) -> int:
        return self.ids.count(ROW)

    def rows(self) -> Float[np.ndarray, "R D"]:
        rows_RD = self.compute()
        if len(rows_RD) != self.count:
            raise UserError(f"{self.kind}: the prompt has {self.count} places, but the tower made {len(rows_RD)} rows")
        return rows_RD


@dataclasses.dataclass(frozen=True, eq=False)
class Media:
    """The rows of a prompt, which ids from `first` on stand for, and for each a number by which caches know it: equal
    only for equal rows.
    """

    first: int
    rows_RD: Float[np.ndarray, "R D"]
    keys: tuple[int, ...]
    counts: Counter[str]  # rows of each kind

    def known(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Ids as caches know them: equal ones stand for equal tokens or equal rows."""
        return tuple(token if token < self.first else self.keys[token - self.first] for token in ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt as the model reads it. Towers run when `media` is asked for, not before."""

    ids: tuple[int, ...]
    vocab_size: int
    shown: tuple[Shown, ...] = ()

    @functools.cached_property
    def media(self) -> Media | None:
        """None without any rows."""
        if not self.shown:
            return None
        counts = Counter[str]()
        for part in self.shown:
            counts[part.kind] += part.count
        keys = [int.from_bytes(part.digest) << 32 | row for part in self.shown for row in range(part.count)]
        return Media(self.vocab_size, np.concatenate([part.rows() for part in self.shown]), tuple(keys), counts)


def assemble(pieces: Iterable[Sequence[int] | Shown], vocab_size: int) -> Encoded:
    """Token ids and parts, one after another."""
    ids, shown, row = list[int](), list[Shown](), vocab_size
    for piece in pieces:
        if isinstance(piece, Shown):
            shown.append(piece)
        for token in piece.ids if isinstance(piece, Shown) else piece:
            ids.append(row if token == ROW else token)
            row += token == ROW
    return Encoded(tuple(ids), vocab_size, tuple(shown))


def batched(prompts: Sequence[Encoded]) -> tuple[list[list[int]], Float[np.ndarray, "R D"] | None]:
    """Ids of several prompts, and the rows of all, padded to one of a few sizes; None without any."""
    ids, rows, before = list[list[int]](), list[np.ndarray](), 0
    for prompt in prompts:
        ids.append([token + before * (token >= prompt.vocab_size) for token in prompt.ids])
        if prompt.media is not None:
            rows.append(prompt.media.rows_RD)
            before += len(prompt.media.rows_RD)
    if not rows:
        return ids, None
    return ids, padded(np.concatenate(rows))


def padded(rows_RD: Float[np.ndarray, "R D"]) -> Float[np.ndarray, "_ D"]:
    """With more rows, up to one of a few numbers of them: each is a program of its own."""
    return np.pad(rows_RD, ((0, size_for(len(rows_RD), FEWEST_ROWS) - len(rows_RD)), (0, 0)))
