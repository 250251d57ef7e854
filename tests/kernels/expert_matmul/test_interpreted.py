"""The Hopper kernels' pipeline, activation buffers, schedule and stores, interpreted; only products are plain JAX."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT = 240  # seconds, on a busy machine; a process that hangs is a failure


CASES = ["random routing", "a long block", "invariance", "chunk invariance", "a long prompt"]


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_agree(case):
    """The definition within the bound on W4A16, no race; a token's bits are the same whatever is computed with it."""
    command = [sys.executable, "-m", "tests.kernels.expert_matmul.interpreted", case]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0 and done.stdout.strip().endswith("agreed"), done.stderr[-2000:]
