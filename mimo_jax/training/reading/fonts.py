"""Monospaced fonts, from packages that bring them along."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_jax.errors import UserError

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont


@dataclasses.dataclass(frozen=True)
class Font:
    """`pattern` finds its one file below `package`. Of one that `is_held_out` training sees nothing."""

    package: str
    pattern: str
    is_held_out: bool = False


FONTS = {
    "DejaVu Sans Mono": Font("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono.ttf"),
    "DejaVu Sans Mono Bold": Font("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono-Bold.ttf"),
    "DejaVu Sans Mono Oblique": Font("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono-Oblique.ttf"),
    "Inconsolata": Font("imgui_bundle", "assets/fonts/Inconsolata-Medium.ttf"),
    "Roboto Mono": Font("textual_serve", "static/fonts/RobotoMono-VariableFont_wght.ttf"),
    "Source Code": Font("streamlit", "static/static/media/SourceCodeVF-Upright.*.woff2"),
    "Fira Code": Font("rich_codex", "fonts/FiraCode-Regular.ttf", is_held_out=True),
    "Computer Modern Typewriter": Font("matplotlib", "mpl-data/fonts/ttf/cmtt10.ttf", is_held_out=True),
}
TRAINED = tuple(name for name, font in FONTS.items() if not font.is_held_out)
HELD_OUT = tuple(name for name, font in FONTS.items() if font.is_held_out)


def font_file(name: str, folder: Path | None = None) -> Path:
    """Where a font lies: in `folder`, into which packages were installed, or in this environment."""
    font = FONTS[name]
    roots = [folder / font.package] if folder else []
    if spec := importlib.util.find_spec(font.package):
        roots += map(Path, spec.submodule_search_locations or ())
    for root in roots:
        if found := sorted(root.glob(font.pattern)):
            return found[0]
    raise UserError(f"font {name!r}: the package {font.package} is not installed; `make fonts` installs all of them")


def load_font(path: Path, size: int) -> FreeTypeFont:
    """Of so many pixels to the em, without the shaping by which ligatures arise."""
    from PIL import ImageFont

    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
