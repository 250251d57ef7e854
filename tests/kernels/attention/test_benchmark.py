"""The benchmark as far as a CPU goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_it_runs_small_on_a_cpu():
    """It ends with one line of JSON that holds a time for each length, and claims no fraction of a GPU."""
    command = [sys.executable, "-m", "pallas_kernels.attention.benchmark"]
    command += ["--tokens", "4", "--contexts", "8", "1024", "--repeats", "1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["backends"]["reference"]["rows"]
    assert [row["context"] for row in rows] == [8, 1024] and all(row["ms"] > 0 for row in rows)
    assert all("of_datasheet" not in row and row["error"] < 1e-2 for row in rows)  # bf16 weights against float32 ones
