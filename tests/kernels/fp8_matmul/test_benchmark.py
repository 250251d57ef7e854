"""The benchmark as far as a CPU goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_it_runs_small_on_a_cpu():
    """It ends with one line of JSON that holds a time for each number of tokens, and claims no fraction of a GPU."""
    command = [sys.executable, "-m", "pallas_kernels.fp8_matmul.benchmark", "--tokens", "1", "20", "--repeats", "1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["shapes"]["small"]
    assert [row["tokens"] for row in rows] == [1, 20]
    assert all(row["us"] > 0 and "of_datasheet" not in row for row in rows)
