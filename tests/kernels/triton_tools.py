"""What the tests of Triton kernels share: what they need, and Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import topology, triton_call

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = triton_call.is_installed() and importlib.util.find_spec("triton") is not None
needs_triton = [
    pytest.mark.skipif(not HAS_TRITON, reason="jax-triton or triton is not installed (the extra `triton`)"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),  # jax-triton 0.4 leaves it to Triton
]
needs_compiler = pytest.mark.skipif(topology.missing() is not None, reason=str(topology.missing()))
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="Triton's interpreter takes tensors")


def run_interpreted(kernels: str) -> None:
    """`interpreted_triton.py` of a folder beside this file, as a process: Triton reads the switch when imported."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", f"tests.kernels.{kernels}.interpreted_triton"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.strip().endswith("agreed"), done.stderr[-2000:]
