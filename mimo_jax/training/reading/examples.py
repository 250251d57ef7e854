"""Batches to learn reading from: patches of pictures, and which characters each token of the tower has to tell.

A token of the tower is a square of a picture. Lines are at least as far apart as it is high, so no more than one line
has its centre in it, and of that line at most `SLOTS` characters: each belongs to the slot that its centre lies in.
Beside its own, a token tells characters around them, in the order of reading: so who reads on finds in one place what
has just been read and what comes next.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from mimo_jax.config.towers import MediaConfig, VisionConfig
from mimo_jax.media.pixels import patches_of
from mimo_jax.modeling.vision import Places, places_of
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training.reading.pictures import Picture, draw
from mimo_jax.training.reading.snippets import CHARACTERS, Shape, snippet

SLOTS = 3  # of a token
NOTHING = 0  # in a slot; character k is class k + 1
CLASSES = 1 + len(CHARACTERS)
BEFORE, AFTER = 3, 5  # characters around a token's own that it tells, too
NEWLINE = CLASSES  # among these; NOTHING: before the first character and after the last
# Tokens of a picture, as it is padded; what is drawn of so many; how many tokens its text may have, the end included.
SIZES = {64: Shape(1, 3), 128: Shape(2, 6), 256: Shape(4, 12)}
TEXT_TOKENS = {64: 48, 128: 96, 256: 192}


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
    """Pictures of one padded size. `labels` are classes of slots, `around` those of the characters before and after
    them, -1 where a token has none of its own; `count` is how many tokens a picture has.
    """

    patches_BSP: Float[np.ndarray, "B S P"]
    places: Places  # of each
    labels_BRN: Int[np.ndarray, "B R N"]
    around_BRA: Int[np.ndarray, "B R A"]
    counts_B: Int[np.ndarray, "B"]

    @property
    def size(self) -> int:
        """Tokens of a picture, padding included."""
        return self.labels_BRN.shape[1]


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture as the tower reads it, and its text."""

    patches_SP: np.ndarray
    rows: int
    columns: int
    labels_RN: np.ndarray
    around_RA: np.ndarray
    text: str

    @property
    def count(self) -> int:
        return len(self.labels_RN)


def examples(reader: Reader, rng: np.random.Generator, size: int) -> Iterator[Example]:
    """Without end: of at most `size` tokens and `TEXT_TOKENS` of text, with a slot for each character. Two lines can
    fall into one row of tokens where a picture is made smaller to a whole number of them.
    """
    while True:
        lines = snippet(reader.tokens, reader.tokenizer, rng, SIZES[size])
        if len(reader.tokenizer.encode("\n".join(lines), literal=True)) >= TEXT_TOKENS[size]:
            continue
        found = example_of(draw(lines, reader.fonts[rng.integers(len(reader.fonts))], rng), reader)
        if found.count <= size and np.count_nonzero(found.labels_RN) == sum(map(len, lines)):
            yield found


def example_of(picture: Picture, reader: Reader) -> Example:
    vision, media = reader.vision, reader.media
    patches = patches_of(picture.pixels_HW3[None], vision, media.image_min_pixels, media.image_max_pixels)
    places_RN = places_in(picture, patches.rows // vision.merge, patches.columns // vision.merge)
    text = "\n".join(picture.lines)
    labels_RN, around_RA = classes_at(text, places_RN), around(text, places_RN)
    return Example(patches.values_FSP[0], patches.rows, patches.columns, labels_RN, around_RA, text)


def places_in(picture: Picture, rows: int, columns: int) -> Int[np.ndarray, "R N"]:
    """For every slot of `rows` x `columns` tokens, the place in the text of the character in it; -1: none."""
    height, width, _ = picture.pixels_HW3.shape
    places, begin = np.full((rows, columns * SLOTS), -1, np.int32), 0
    for line, text in enumerate(picture.lines):
        for column in range(len(text)):
            x, y = picture.centre(line, column)
            places[int(y * rows / height), int(x * columns * SLOTS / width)] = begin + column
        begin += len(text) + 1
    return places.reshape(rows * columns, SLOTS)


def classes_at(text: str, places: Int[np.ndarray, "*S"]) -> Int[np.ndarray, "*S"]:
    """Classes of the characters at places of a text, newlines included; NOTHING outside of it."""
    known = [NEWLINE if character == "\n" else 1 + CHARACTERS.index(character) for character in text]
    inside = (places >= 0) & (places < len(text))
    return np.where(inside, np.array(known, np.int32)[np.where(inside, places, 0)], NOTHING).astype(np.int32)


def around(text: str, places_RN: Int[np.ndarray, "R N"]) -> Int[np.ndarray, "R A"]:
    """Classes of the characters before, the nearest first, and after those of each token; -1 where it has none."""
    has_own = places_RN.max(axis=1) >= 0
    first = np.where(places_RN >= 0, places_RN, len(text)).min(axis=1)
    last = places_RN.max(axis=1)
    near = [first[:, None] - 1 - np.arange(BEFORE), last[:, None] + 1 + np.arange(AFTER)]
    return np.where(has_own[:, None], classes_at(text, np.concatenate(near, axis=1)), -1)


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
    near = np.full((len(found), size, BEFORE + AFTER), -1, np.int32)
    for row, example in enumerate(found):
        patches[row, : len(example.patches_SP)] = example.patches_SP
        labels[row, : example.count], near[row, : example.count] = example.labels_RN, example.around_RA
    places = [places_of(example.rows, example.columns, size * merge**2, merge) for example in found]
    stacked = jax.tree.map(lambda *each: np.stack(each), *places)
    return Batch(patches, stacked, labels, near, np.array([example.count for example in found], np.int32))


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
