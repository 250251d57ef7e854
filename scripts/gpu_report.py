"""Everything that needs a GPU, in one go: tests marked `gpu`, every kernel's benchmark, one JSON file of results.

scripts/gpu_report.py [--out docs/results]
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser
from mimo_jax.cli.values import output_folder
from mimo_jax.errors import UserError
from mimo_jax.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-triton")
NO_TESTS = 5  # pytest's exit code when nothing was selected


def device() -> dict:
    """The GPU that JAX sees, and the driver."""
    import jax

    if jax.default_backend() != "gpu":
        raise UserError("gpu_report: JAX sees no GPU; install the package's `cuda` extra on a machine that has one")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"gpu_report: nvidia-smi ended with {found.returncode}: {found.stderr or found.stdout}")
    smi = found.stdout.strip().splitlines()
    return {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "nvidia_smi": smi}


def versions() -> dict[str, str]:
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return {"python": sys.version.split()[0], **{name: installed[name] for name in PACKAGES if name in installed}}


def run_tests() -> dict:
    """The tests marked `gpu`, on the GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="", file=sys.stderr)
    return {"passed": done.returncode in (0, NO_TESTS), "summary": done.stdout.strip().splitlines()[-1:]}


def run_benchmark(path: Path) -> dict:
    """A benchmark prints for people and ends with one line of JSON, which is kept."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="", file=sys.stderr)
    last = done.stdout.strip().splitlines()[-1:]
    try:
        return {"module": module, "passed": done.returncode == 0, "result": json.loads(last[0])}
    except (IndexError, json.JSONDecodeError):
        return {"module": module, "passed": False, "result": last}


def parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--out", type=output_folder, default=str(ROOT / "docs" / "results"), help="folder of the JSON file"
    )
    return parser


def main(argv: list[str]) -> None:
    out = parser().parse_args(argv).out
    found = device()
    benchmarks = [run_benchmark(path) for path in sorted((ROOT / "pallas_kernels").glob("*/benchmark.py"))]
    report = {
        "date": datetime.date.today().isoformat(),
        "device": found,
        "versions": versions(),
        "tests": run_tests(),
        "benchmarks": benchmarks,
    }
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", found["kind"].lower()).strip("-")
    path = out / f"{name}-{report['date']}.json"
    write_atomically(path, json.dumps(report, indent=1).encode() + b"\n")
    print(json.dumps({"file": str(path), "tests_passed": report["tests"]["passed"]}))
    if not report["tests"]["passed"] or not all(benchmark["passed"] for benchmark in benchmarks):
        sys.exit(1)


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
