"""Pictures: asked for before any work is done, written whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mimo_jax.cli.options import need_packages
from mimo_jax.files import write_atomically


def need_matplotlib() -> None:
    """Raises where a plot could not be drawn."""
    need_packages("plot", "plots", "matplotlib")


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure of matplotlib as PNG, whatever the file is called."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomically(path, data.getvalue())
