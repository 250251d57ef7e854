"""Draws the code below as training draws: `python -m tests.tools.code_picture docs/figures/code.png`."""

import sys
from pathlib import Path

import numpy as np

from mimo_jax.training.reading.fonts import font_file
from mimo_jax.training.reading.pictures import draw

CODE = '''\
def total(prices, tax):
    """What a basket costs."""
    cost = sum(prices)
    return cost * (1 + tax)'''


def main(target: str) -> None:
    picture = draw(CODE.split("\n"), font_file("DejaVu Sans Mono"), np.random.default_rng(0), size=16)
    Path(target).write_bytes(picture.png())


if __name__ == "__main__":
    main(*sys.argv[1:])
