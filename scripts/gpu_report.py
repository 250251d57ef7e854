"""Everything that needs a GPU, in one go: tests marked `gpu`, benchmarks, one JSON file of results.

scripts/gpu_report.py [--out docs/results] [--steps tests soak ...]

The file is written after every step, and steps that it says have passed are not run again on the same day.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser
from mimo_jax.cli.values import output_folder, real
from mimo_jax.errors import UserError
from mimo_jax.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-triton")
NO_TESTS = 5  # pytest's exit code when nothing was selected
# The plug-in for benchmarks, where somebody has installed it, warns of several processes, and warnings are errors.
STEPS = {
    "tests": ("-m", "pytest", "-q", "-m", "gpu", "-n", "auto", "-p", "no:benchmark"),
    "soak": ("scripts/benchmark.py", "soak"),
    "round": ("scripts/benchmark.py", "round"),
    "slice": ("scripts/benchmark.py", "slice", "--context", "1024"),
    "expert_matmul": ("-m", "pallas_kernels.expert_matmul.benchmark"),
    "fp8_matmul": ("-m", "pallas_kernels.fp8_matmul.benchmark"),
    "attention": ("-m", "pallas_kernels.attention.benchmark"),
}


def device() -> dict:
    """The GPU that JAX sees, and the driver; asked for by another process, which leaves the memory to the steps."""
    asked = "import jax; print(jax.default_backend(), jax.device_count(), jax.devices()[0].device_kind)"
    backend, count, kind = _output(sys.executable, "-c", asked).split(maxsplit=2)
    if backend != "gpu":
        raise UserError("gpu_report: JAX sees no GPU; install the package's `cuda` extra on a machine that has one")
    smi = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {"kind": kind, "count": int(count), "nvidia_smi": smi.splitlines()}


def _output(*command: str) -> str:
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"gpu_report: {command[0]} ended with {found.returncode}: {found.stderr or found.stdout}")
    return found.stdout.strip()


def versions() -> dict[str, str]:
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return {"python": sys.version.split()[0], **{name: installed[name] for name in PACKAGES if name in installed}}


def run(name: str, limit: float) -> dict:
    """A step's outcome: whether it passed, its seconds, and the last line that it printed, as JSON if it is that."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if name == "tests" else None
    started, command = time.monotonic(), STEPS[name]
    print(f"== {name}: {' '.join(command)}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=limit, env=environment
        )
        code, lines = done.returncode, done.stdout.strip().splitlines()
    except subprocess.TimeoutExpired:
        code, lines = None, [f"took more than {limit:.0f} s"]
    print(*lines[:-1], sep="\n", file=sys.stderr, flush=True)
    last = lines[-1] if lines else ""
    try:
        result = json.loads(last)
    except json.JSONDecodeError:
        result = last
    seconds = round(time.monotonic() - started, 1)
    return {"command": " ".join(command), "passed": code in (0, NO_TESTS), "seconds": seconds, "result": result}


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=output_folder, default=str(ROOT / "docs" / "results"), help="folder of the JSON file"
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which, in this order")
    parser.add_argument("--limit", type=real(1, 86400), default=300.0, help="seconds that a step may take")
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    found = device()
    args.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", found["kind"].lower()).strip("-")
    path = args.out / f"{name}-{datetime.date.today().isoformat()}.json"
    report = {"device": found, "versions": versions(), "steps": {}}
    if path.exists():
        report["steps"] = json.loads(path.read_bytes())["steps"]
    for step in args.steps:
        if not report["steps"].get(step, {}).get("passed"):
            report["steps"][step] = run(step, args.limit)
            write_atomically(path, json.dumps(report, indent=1).encode() + b"\n")
    failed = [step for step in args.steps if not report["steps"][step]["passed"]]
    print(json.dumps({"file": str(path), "failed": failed}))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
