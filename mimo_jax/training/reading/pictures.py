"""Pictures of code as editors and terminals show it, and where each character of them is."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mimo_jax.training.reading.fonts import load_font

EMS = (11, 19)  # pixels
LINE_HEIGHTS = (1.1, 1.5)  # in ems
LEAST_PITCH = 17  # pixels from line to line: a little more than that of the tower's tokens, so that none has two lines
MARGIN = 12  # pixels, at most
MOST_NOISE = 12.0  # standard deviation, of 255 levels
LEAST_CONTRAST = 90  # levels between the ground and what is written on it


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where characters of one width stand, in pixels: line by line, column by column."""

    left: float
    top: float
    advance: float  # from character to character
    pitch: float  # from line to line
    width: int  # of the whole picture
    height: int

    def centre(self, line: int, column: int) -> tuple[float, float]:
        """(x, y) of a character."""
        return self.left + (column + 0.5) * self.advance, self.top + (line + 0.5) * self.pitch


@dataclasses.dataclass(frozen=True)
class Picture:
    """What was drawn: lines of text in a grid."""

    pixels_HW3: Float[np.ndarray, "H W 3"]
    lines: tuple[str, ...]
    grid: Grid

    def png(self) -> bytes:
        """As a file, in whole levels."""
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(np.rint(self.pixels_HW3).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()


def grid_of(lines: Sequence[str], size: int, advance: float, tallest: float, rng: np.random.Generator) -> Grid:
    """With random margins and a random pitch, for a font of `size` pixels to the em."""
    pitch = max(LEAST_PITCH, round(size * rng.uniform(*LINE_HEIGHTS)), tallest)
    left, top, right, bottom = rng.integers(1, MARGIN, 4).tolist()
    width = int(np.ceil(left + advance * max(map(len, lines)) + right))
    return Grid(left, top, advance, pitch, width, int(top + pitch * len(lines) + bottom))


def draw(lines: Sequence[str], file: Path, rng: np.random.Generator, size: int | None = None) -> Picture:
    """Lines in a font at a random size, with random margins, colours and noise."""
    from PIL import Image, ImageDraw

    size = int(rng.integers(EMS[0], EMS[1] + 1)) if size is None else size
    font = load_font(file, size)
    ascent, descent = font.getmetrics()
    grid = grid_of(lines, size, font.getlength("M"), ascent + descent, rng)
    ground, inks = _colours(rng)
    picture = Image.new("RGB", (grid.width, grid.height), ground)
    pen, above = ImageDraw.Draw(picture), (grid.pitch - ascent - descent) / 2
    for row, line in enumerate(lines):
        for column, word in _words(line):
            ink = inks[rng.integers(len(inks))]
            place = (grid.left + column * grid.advance, grid.top + row * grid.pitch + above)
            pen.text(place, word, fill=ink, font=font)
    pixels = np.asarray(picture, np.float32)
    pixels += rng.normal(0, rng.uniform(0, MOST_NOISE), pixels.shape).astype(np.float32)
    return Picture(pixels.clip(0, 255), tuple(lines), grid)


def _words(line: str) -> list[tuple[int, str]]:
    """Stretches without spaces, and the column that each begins at."""
    found, column = list[tuple[int, str]](), 0
    for word in line.split(" "):
        if word:
            found.append((column, word))
        column += len(word) + 1
    return found


def _colours(rng: np.random.Generator) -> tuple[tuple[int, int, int], list[tuple[int, int, int]]]:
    """A ground, dark or light, and one to four inks that stand out from it, as highlighting has them."""
    is_dark = rng.random() < 0.5
    ground = rng.integers(0, 60, 3) if is_dark else rng.integers(200, 256, 3)
    inks = list[tuple[int, int, int]]()
    count = int(rng.integers(1, 5))
    while len(inks) < count:
        ink = rng.integers(0, 256, 3)
        if abs(float(ink.mean() - ground.mean())) >= LEAST_CONTRAST:
            inks.append(_rgb(ink))
    return _rgb(ground), inks


def _rgb(levels: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = levels.tolist()
    return red, green, blue
