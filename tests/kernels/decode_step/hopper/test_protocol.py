"""The persistent kernel's protocol, interpreted: rows, counters, ring, pages and sends of several CTAs and devices."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernels.decode_step.hopper.protocol import BROKEN, STUCK

ROOT = Path(__file__).resolve().parents[4]
WHOLE = ""
WAITS_FOR_EVER = {"no signal of the stream", "no signal of arrival"}
TIMEOUT = 240  # seconds, on a busy machine; a process that hangs is a failure


def run(broken: str) -> subprocess.CompletedProcess:
    """In a process of its own: when one simulated thread fails, others wait for ever."""
    places = (BROKEN[broken], 2) if broken else (2, 4)  # devices, CTAs
    command = [sys.executable, "-m", "tests.kernels.decode_step.hopper.interpreted", *map(str, places), broken]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future]]:
    """Two at a time: most of a run is one thread after the other."""
    with ThreadPoolExecutor(2) as pool:
        yield {broken: pool.submit(run, broken) for broken in [WHOLE, *BROKEN]}


def test_two_devices_of_four_ctas_agree(runs):
    """Two rounds, no counter zeroed: within 1e-5 of float64, and on each device sums in rank order to the bit."""
    done = runs[WHOLE].result()
    assert done.stdout.split("\n")[-2:] == ["agreed", ""], done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_broken_is_noticed(broken, runs):
    """A wait, a signal or an order that is left out shows: as a wrong number, a barrier's error, or a wait for ever."""
    done = runs[broken].result()
    assert "agreed" not in done.stdout
    assert done.returncode == (STUCK if broken in WAITS_FOR_EVER else 1), done.stderr[-2000:]
    assert broken in WAITS_FOR_EVER or "AssertionError" in done.stderr or "arrier" in done.stderr, done.stderr[-2000:]
