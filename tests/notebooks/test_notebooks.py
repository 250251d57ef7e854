"""Notebooks run from start to end, draw something, and open in Jupyter as cells."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
_RUN = """
import runpy, sys
from matplotlib import pyplot
shown = []
pyplot.show = lambda: shown.append(len(pyplot.get_fignums()))
runpy.run_path(sys.argv[1], run_name="__main__")
print("figures:", sum(shown))
"""


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    """Anywhere, in a fresh process, without an error or a warning of ours; and it shows a picture."""
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(FOLDER.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _RUN, str(notebook)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rpartition("figures:")[2]) >= 1
    assert "Warning" not in done.stderr, done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_made_of_cells(notebook: Path) -> None:
    """It begins with a title, and everything in it belongs to a text or a code cell, none of them empty."""
    content = notebook.read_text()
    assert content.startswith("# %% [markdown]\n# # ")
    cells = re.split(r"^# %%( \[markdown\])?\n", content, flags=re.MULTILINE)[1:]
    for kind, body in zip(cells[::2], cells[1::2]):
        assert body.strip()
        if kind:
            assert all(line.startswith("#") for line in body.strip().splitlines())
