"""The benchmark as far as a CPU goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_it_runs_small_on_a_cpu():
    """It ends with one line of JSON that holds a time for each number of tokens, and claims no fraction of a GPU."""
    command = [sys.executable, "-m", "pallas_kernels.expert_matmul.benchmark"]
    command += ["--shape", "small", "--backends", "reference", "--tokens", "1", "4", "--repeats", "1", "--rounds", "1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    rows = report["backends"]["reference"]["rows"]
    assert [row["tokens"] for row in rows] == [1, 4] and all(row["us"] > 0 for row in rows)
    assert report["streaming_read"] is None and "of_datasheet" not in rows[0]
    assert report["backends"]["reference"]["error"] < 1e-2  # bf16 hidden activations against float32 ones
