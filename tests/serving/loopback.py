"""Commands in a network of their own, with nothing but loopback: what they start may listen where it likes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A process namespace, too: nothing outlives the command.
ALONE = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
ALONE += ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
SECONDS = 240


def skip_where_namespaces_are_not_allowed() -> None:
    try:
        subprocess.run([*ALONE, "true"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no network namespace of its own: {error}")


def seen_by(tool: str, *arguments: str) -> dict:
    """What a script of tests/tools, run there, prints as its last line."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [*ALONE, sys.executable, str(ROOT / "tests" / "tools" / tool), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
