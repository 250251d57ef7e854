"""Documentation: links lead somewhere, every page of how-it-works has its figure, and the script draws it."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "notebooks" / "README.md"]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    """Every file that a page links to, or shows, is there."""
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "how-it-works" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_has_a_figure_that_is_drawn(figures) -> None:
    """One each, of those that the script knows; and none is drawn for nothing."""
    shown = []
    for page in sorted((ROOT / "docs" / "how-it-works").glob("[0-9]*.md")):
        (figure,) = re.findall(r"!\[[^\]]+\]\(\.\./figures/(\w+)\.png\)", page.read_text())
        shown.append(figure)
    assert shown == list(figures.FIGURES)


@pytest.mark.parametrize("name", ["dflash", "verification", "mxfp4", "mesh", "schedule"])
def test_a_figure_is_drawn(figures, name: str, tmp_path: Path) -> None:
    figures.main(["--out", str(tmp_path), "--only", name])
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
