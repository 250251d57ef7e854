"""Kill -9 at random moments: a checkpoint is absent or complete, and doing it again succeeds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_jax.checkpoint.convert import to_orbax
from tests.checkpoint.samples import random_tensors, save_checkpoint, small

ROOT = Path(__file__).parents[2]


def run_trials(folder: Path, kind: str, count: int) -> dict:
    """The report of `kill_trials`."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.tools.kill_trials", str(folder), kind, str(count)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["broken"] == 0, result.stderr
    assert report["absent"] + report["complete"] == count + 2
    assert report["killed"] >= count // 2  # most kills struck while it worked
    return report


@pytest.mark.parametrize("direction", ["to-orbax", "to-hf"])
def test_killed_conversions(tmp_path, direction: str) -> None:
    """50 killed conversions, 25 each way: the destination is absent or verifies, and nothing is left beside it."""
    config = small(layer_pattern=(0, 1), moe_pattern=(0, 1))
    save_checkpoint(tmp_path / "hf", config, random_tensors(config))
    if direction == "to-hf":
        to_orbax(tmp_path / "hf", tmp_path / "orbax")
        shutil.rmtree(tmp_path / "hf")
    report = run_trials(tmp_path, direction, 25)
    assert report["left"] == sorted(["hf" if direction == "to-orbax" else "orbax", "out"])


def test_killed_training_saves(tmp_path) -> None:
    """50 killed saves: every listed step restores to what was saved; a later save clears the debris away."""
    report = run_trials(tmp_path, "save", 50)
    assert all(name.isdigit() for name in report["left"]) and len(report["left"]) == 2
