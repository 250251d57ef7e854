"""Batches to learn reading from: patches of pictures, which characters each square has, and which tokens it is to say.

A token of the tower is a square of a picture. Lines are at least as far apart as it is high, so no more than one line
has its centre in it, and of that line at most `SLOTS` characters: each belongs to the slot that its centre lies in.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mimo_jax.config.towers import MediaConfig, VisionConfig
from mimo_jax.media.pixels import patches_of
from mimo_jax.modeling.vision import Places, places_of
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training.reading.pictures import Picture, draw
from mimo_jax.training.reading.rows import SILENT, VOLUMES, said, transcript
from mimo_jax.training.reading.snippets import CHARACTERS, Shape, snippet

SLOTS = 3  # of a token
NOTHING = 0  # in a slot; character k is class k + 1
CLASSES = 1 + len(CHARACTERS)
# Tokens of a picture, as it is padded; what is drawn of so many; how many tokens its rows may say, the end included.
SIZES = {64: Shape(1, 3), 128: Shape(2, 6), 256: Shape(4, 12)}
TEXT_TOKENS = {64: 64, 128: 128, 256: 256}


@dataclasses.dataclass(frozen=True)
class Reader:
    """Where pictures come from: what is drawn, in which fonts, and how the tower cuts it."""

    tokens: np.ndarray
    tokenizer: Tokenizer
    fonts: tuple[Path, ...]
    vision: VisionConfig
    media: MediaConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures of one padded size. `labels` are classes of slots, `said` the text's tokens (see `rows`), and `count` is
    how many squares a picture has.
    """

    patches_BSP: Float[np.ndarray, "B S P"]
    places: Places  # of each
    labels_BRN: Int[np.ndarray, "B R N"]
    said_BRN: Int[np.ndarray, "B R _"]
    counts_B: Int[np.ndarray, "B"]

    @property
    def size(self) -> int:
        """Tokens of a picture, padding included."""
        return self.labels_BRN.shape[1]

    @property
    def is_real_BR(self) -> Bool[Array, "B R"]:
        """Which of them are no padding."""
        return jnp.arange(self.size) < self.counts_B[:, None]


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture as the tower reads it, and its text."""

    patches_SP: np.ndarray
    rows: int
    columns: int
    labels_RN: np.ndarray
    said_RN: np.ndarray

    @property
    def count(self) -> int:
        return len(self.labels_RN)

    @property
    def ids(self) -> tuple[int, ...]:
        """Of the text, as its rows say it."""
        return transcript(self.said_RN)


def examples(reader: Reader, rng: np.random.Generator, size: int) -> Iterator[Example]:
    """Without end: of at most `size` squares and `TEXT_TOKENS` of text, with a slot for each character and room for
    each token. Two lines can fall into one row of squares where a picture is made smaller to a whole number of them.
    """
    while True:
        lines = snippet(reader.tokens, reader.tokenizer, rng, SIZES[size])
        found = example_of(draw(lines, reader.fonts[rng.integers(len(reader.fonts))], rng), reader)
        if found and fits(found.said_RN, size) and np.count_nonzero(found.labels_RN) == sum(map(len, lines)):
            yield found


def fits(said_RN: Int[np.ndarray, "R N"], size: int) -> bool:
    """Whether a picture that says this, and what it says, have room among others of `size`."""
    return len(said_RN) <= size and len(transcript(said_RN)) < TEXT_TOKENS[size]


def example_of(picture: Picture, reader: Reader) -> Example | None:
    """None where a square has no room for its tokens."""
    vision, media = reader.vision, reader.media
    patches = patches_of(picture.pixels_HW3[None], vision, media.image_min_pixels, media.image_max_pixels)
    rows, columns = patches.rows // vision.merge, patches.columns // vision.merge
    said_RN = said(picture.lines, reader.tokenizer, picture.grid, rows, columns)
    if said_RN is None:
        return None
    labels_RN = labels_in(picture, rows, columns)
    return Example(patches.values_FSP[0], patches.rows, patches.columns, labels_RN, said_RN)


def labels_in(picture: Picture, rows: int, columns: int) -> Int[np.ndarray, "R N"]:
    """For every slot of `rows` x `columns` squares, the class of the character in it."""
    labels, grid = np.full((rows, columns * SLOTS), NOTHING, np.int32), picture.grid
    for line, text in enumerate(picture.lines):
        for column, character in enumerate(text):
            x, y = grid.centre(line, column)
            place = int(y * rows / grid.height), int(x * columns * SLOTS / grid.width)
            labels[place] = 1 + CHARACTERS.index(character)
    return labels.reshape(rows * columns, SLOTS)


def spelled(labels_RN: Int[np.ndarray, "R N"], columns: int) -> str:
    """The text that the slots' classes spell: rows of tokens without any character are between two lines."""
    lines = list[str]()
    for row in np.asarray(labels_RN).reshape(-1, columns * SLOTS):
        line = "".join(CHARACTERS[label - 1] for label in row if label != NOTHING)
        if line:
            lines.append(line.rstrip())
    return "\n".join(lines)


def batched(found: Sequence[Example], size: int, merge: int) -> Batch:
    """Examples of at most `size` tokens, padded to it."""
    patches = np.zeros((len(found), size * merge**2, found[0].patches_SP.shape[1]), np.float32)
    labels = np.full((len(found), size, SLOTS), NOTHING, np.int32)
    said_BRN = np.full((len(found), size, len(VOLUMES)), SILENT, np.int32)
    for row, example in enumerate(found):
        patches[row, : len(example.patches_SP)] = example.patches_SP
        labels[row, : example.count], said_BRN[row, : example.count] = example.labels_RN, example.said_RN
    places = [places_of(example.rows, example.columns, size * merge**2, merge) for example in found]
    stacked = jax.tree.map(lambda *each: np.stack(each), *places)
    return Batch(patches, stacked, labels, said_BRN, np.array([example.count for example in found], np.int32))


def batches(
    reader: Reader, tokens: int, seed: int, first: int = 0, sizes: Sequence[int] | None = None
) -> Iterator[tuple[Batch, list[Example]]]:
    """Batches of about so many tokens, each of pictures of one of `sizes` (None: any); batch k depends on (seed, k)."""
    step = first
    while True:
        rng = np.random.default_rng((seed, step))
        size = int(rng.choice(sizes or list(SIZES)))
        found = list(itertools.islice(examples(reader, rng, size), max(1, tokens // size)))
        yield batched(found, size, reader.vision.merge), found
        step += 1
