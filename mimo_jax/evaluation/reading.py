"""How well a model reads pictures of code: the share of characters it writes down right, font by font."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.cli.progress import progress
from mimo_jax.decode.sampling import Greedy
from mimo_jax.errors import UserError
from mimo_jax.evaluation.ratios import ratio
from mimo_jax.generation import Request, generate_batch
from mimo_jax.loading import Model
from mimo_jax.media.parts import Image
from mimo_jax.tokenizer import END_OF_TEXT
from mimo_jax.training.reading.fonts import FONTS, HELD_OUT, font_file
from mimo_jax.training.reading.pictures import draw
from mimo_jax.training.reading.snippets import Shape, snippet

ROWS = 8  # pictures that are read together
LIKE_TRAINING = Shape(1, 8)
MOST_TOKENS = 320  # of a transcript


@dataclasses.dataclass(frozen=True)
class Told:
    """A picture's text, and what the model wrote."""

    font: str
    text: str
    found: str

    @property
    def errors(self) -> int:
        return distance(self.text, self.found)


def distance(one: str, other: str) -> int:
    """Levenshtein's: how many characters have to be put in, left out or changed."""
    codes, previous = np.array([ord(character) for character in other]), np.arange(len(other) + 1)
    for place, character in enumerate(one, start=1):
        changed = previous[:-1] + (codes != ord(character))
        best = np.minimum(previous[1:] + 1, changed)
        row = np.concatenate([[place], best])
        # Putting in: the least over all beginnings, each character further on costing one more.
        previous = np.minimum.accumulate(row - np.arange(len(row))) + np.arange(len(row))
    return int(previous[-1])


def transcribe(
    model: Model, tokens: np.ndarray, count: int, fonts: Path | None, size: int | None = None, seed: int = 0
) -> list[Told]:
    """`count` pictures of snippets in every font, at random sizes or at `size`, greedily."""
    if model.towers is None or model.config.vision is None:
        raise UserError("reading: this model takes no images: it has no vision tower")
    told: list[Told] = []
    end = (model.tokenizer.id_of(END_OF_TEXT),)
    model = dataclasses.replace(model, stop_ids=end)
    with progress("reading", count * len(FONTS)) as bar:
        for name in FONTS:
            file, rng = font_file(name, fonts), np.random.default_rng((seed, len(told)))
            texts = ["\n".join(snippet(tokens, model.tokenizer, rng, LIKE_TRAINING)) for _ in range(count)]
            images = [Image(draw(text.split("\n"), file, rng, size).png()) for text in texts]
            for first in range(0, count, ROWS):
                requests = [Request([image], Greedy(), MOST_TOKENS) for image in images[first : first + ROWS]]
                results = generate_batch(model, requests)
                told += [Told(name, text, result.text) for text, result in zip(texts[first:], results)]
                bar.advance(len(results))
    return told


def by_font(told: Sequence[Told]) -> Iterator[dict[str, Any]]:
    """Accuracy of each font: 1 - errors / characters, with a 95 % interval over pictures."""
    for name in dict.fromkeys(one.font for one in told):
        own = [one for one in told if one.font == name]
        yield {"font": name, "held_out": name in HELD_OUT, **accuracy(own)}


def accuracy(told: Sequence[Told]) -> dict[str, Any]:
    errors = np.array([one.errors for one in told], np.float64)
    lengths = np.array([len(one.text) for one in told], np.float64)
    share, error = ratio(errors, lengths)
    exact = sum(one.text == one.found for one in told)
    return {
        "pictures": len(told),
        "characters": int(lengths.sum()),
        "accuracy": 1 - share,
        "interval": 1.96 * error,
        "exact": exact,
    }
