"""The plan command as a user meets it, on a machine without GPUs or their compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.topology import missing

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **changes}
    command = [sys.executable, ROOT / "scripts" / "plan.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_analytic_part_needs_no_compiler(tmp_path):
    """Bytes, roofline and projections, labelled as such, are printed; the last line is JSON; the plot is drawn."""
    pytest.importorskip("matplotlib")
    done = run("--no-compile", "--target", "8xb200", "--plot", str(tmp_path / "round.png"))
    assert done.returncode == 0, done.stderr
    assert "projected, not measured" in done.stdout
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["largest_context"] == 1_048_576
    assert sum(record["weights"].values()) == pytest.approx(71.2e9, rel=0.01)
    assert (tmp_path / "round.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(
    missing() is None and "PYTHONPATH" not in os.environ, reason="the CUDA plugin is part of this environment"
)
def test_what_is_missing_is_said_with_the_command_that_helps():
    """Without the CUDA plugin the plan is printed all the same, and one line says how to get the rest."""
    done = run("--json", PYTHONPATH=str(ROOT))
    assert done.returncode == 0
    assert "pip install --no-deps jax-cuda13-plugin==" in done.stderr
    assert json.loads(done.stdout)["programs"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "8xh300"), "target '8xh300' must be COUNTxGPU"),
        (("--preset", "mimo-v2-flash"), "drafter: none is published for 'mimo-v2-flash'"),
        (("--target", "16xh200", "--expert-parallel", "16"), "num_kv_heads=8 cannot be split over 16 devices"),
        (("--expert-parallel", "3"), "--expert-parallel 3 must divide the 8 devices"),
        (("--context", "2000000"), "--context 2000000 must lie in 1..1048576"),
    ],
)
def test_plans_that_cannot_be_are_one_line(arguments, message):
    """What cannot be planned ends with exit code 2 and one line that names it."""
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
