"""Runs what of a study has not been run, one line of JSON for each run, as far as its budget goes."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

from mimo_jax.ablation.study import Arm, Study
from mimo_jax.errors import UserError
from mimo_jax.files import exclusive, write_atomically

Record = dict[str, Any]


def run_study(study: Study, out: Path, say: Callable[[str], None]) -> list[Record]:
    """All records of the study, those of `out`/runs.jsonl first. Runs of a seed come together, the control first.

    No run begins once the budget's minutes have been spent, earlier calls included.
    """
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".lock", f"{out}: another process runs a study there"):
        records = read_records(out / "runs.jsonl")
        known = {record["key"]: record for record in records}
        wanted = [(seed, arm) for seed in study.seeds for arm in study.arms]
        for number, (seed, arm) in enumerate(wanted, 1):
            if key_of(study, arm, seed) in known:
                continue
            if sum(record["seconds"] for record in records) >= 60 * study.minutes:
                say(f"the budget of {study.minutes:g} minutes is spent; {number - 1} of {len(wanted)} runs are made")
                break
            say(f"run {number} of {len(wanted)}: {named(arm)}, seed {seed}")
            records.append(_run(study, arm, seed, out))
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_atomically(out / "runs.jsonl", lines.encode())
    keys = {key_of(study, arm, seed) for seed, arm in wanted}
    return [record for record in records if record["key"] in keys]


def _run(study: Study, arm: Arm, seed: int, out: Path) -> Record:
    settings, begun = study.settings_of(arm), time.perf_counter()
    found = study.what.run(settings, seed, out)
    seconds = time.perf_counter() - begun
    if bad := [name for name, value in found.items() if not math.isfinite(value)]:
        raise UserError(f"study: {named(arm)}, seed {seed}: {bad[0]} is {found[bad[0]]}; nothing of it is kept")
    return {
        "key": key_of(study, arm, seed),
        "experiment": study.experiment,
        "arm": arm,
        "seed": seed,
        "settings": settings,
        "metrics": found,
        "seconds": round(seconds, 1),
        "environment": environment(),
    }


def key_of(study: Study, arm: Arm, seed: int) -> str:
    """What a run is known by: all that decides its result."""
    what = json.dumps([study.experiment, study.settings_of(arm), seed], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def named(arm: Arm) -> str:
    return ", ".join(f"{name} {value}" for name, value in arm.items())


def environment() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "machine": platform.machine(),
        "command": " ".join(sys.argv),
    }


def read_records(path: Path) -> list[Record]:
    """The lines of a file of runs, if there is one."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            record["key"], record["seconds"], record["metrics"], record["arm"], record["seed"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no run of a study ({error!r})") from None
        records.append(record)
    return records
