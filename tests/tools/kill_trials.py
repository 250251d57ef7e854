"""Kills conversions and training saves at random moments. Run by `test_interruption.py` in its own process:

    python -m tests.tools.kill_trials FOLDER {to-orbax|to-hf|save} COUNT

Everything is imported once; every trial is a fork that starts JAX for itself, looks at what the last trial left, says
on a pipe that it begins, and works until SIGKILL. Prints JSON:
how many were killed at work, and what was found.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from mimo_jax.checkpoint import orbax
from mimo_jax.checkpoint.convert import to_huggingface, to_orbax, verify

ABSENT, COMPLETE, BROKEN = 10, 11, 12
LONGEST = 60.0


def training_state(step: int) -> dict[str, np.ndarray]:
    """A state that every step fills differently."""
    return {f"w{index}": np.full((64, 257), step * 10 + index, np.float32) for index in range(8)}


def inspect_conversion(folder: Path) -> int:
    """What a killed conversion left: nothing by that name, or a directory that verifies down to the last bit."""
    if not (folder / "out").exists():
        return ABSENT
    verify(folder / "out")
    return COMPLETE


def inspect_saves(folder: Path) -> int:
    """Every listed step restores to exactly what was saved."""
    found = orbax.steps(folder / "run")
    for step in found:
        expected = training_state(step)
        abstract = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in expected.items()}
        held = orbax.restore_step(folder / "run" / f"{step:08d}", abstract)
        for name, array in expected.items():
            np.testing.assert_array_equal(np.asarray(held[name]), array)
    return COMPLETE if found else ABSENT


def convert(folder: Path, direction: str) -> None:
    work = to_orbax if direction == "to-orbax" else to_huggingface
    work(folder / ("hf" if direction == "to-orbax" else "orbax"), folder / "out", overwrite=True)


def save(folder: Path) -> None:
    """Three steps, so that the removal of old ones is under fire too."""
    last = (orbax.steps(folder / "run") or [0])[-1]
    for step in range(last + 1, last + 4):
        orbax.save_step(folder / "run", step, {name: jax.device_put(a) for name, a in training_state(step).items()})


def child(folder: Path, kind: str, ready: int) -> int:
    found = inspect_saves(folder) if kind == "save" else inspect_conversion(folder)
    os.write(ready, bytes([found]))
    if kind == "save":
        save(folder)
    else:
        convert(folder, kind)
    return 0


def trial(folder: Path, kind: str, delay: float | None) -> tuple[int, bool, float]:
    """What the child found, whether it was killed at work, and how long it worked; no `delay` lets it finish."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            code = child(folder, kind, writing)
        except BaseException as error:  # the fork must never return into the parent's loop
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    os.close(writing)
    said = os.read(reading, 1)
    os.close(reading)
    started = time.monotonic()
    if said and delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    worked = time.monotonic() - started
    killed = os.WIFSIGNALED(status)
    if not said or not (killed or os.WEXITSTATUS(status) == 0):
        return BROKEN, killed, worked
    return said[0], killed, worked


def main() -> None:
    folder, kind, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    rng = random.Random(kind)
    found = {ABSENT: 0, COMPLETE: 0, BROKEN: 0}
    _, _, longest = trial(folder, kind, None)
    killed = 0
    for number in range(count):
        if number % 2 and kind != "save":  # half the conversions make a new directory, half replace one
            shutil.rmtree(folder / "out", ignore_errors=True)
        outcome, was_killed, _ = trial(folder, kind, rng.uniform(0, min(longest, LONGEST)))
        found[outcome] += 1
        killed += was_killed
    for _ in range(2):  # the rerun succeeds, and what it made is whole
        outcome, _, _ = trial(folder, kind, None)
        found[outcome] += 1
    names = sorted(path.name for path in (folder / "run" if kind == "save" else folder).iterdir())
    report = {"killed": killed, "absent": found[ABSENT], "complete": found[COMPLETE], "broken": found[BROKEN]}
    print(json.dumps({**report, "seconds_of_work": round(longest, 3), "left": names}))


if __name__ == "__main__":
    main()
