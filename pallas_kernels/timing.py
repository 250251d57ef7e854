"""How the benchmarks of kernels take time, and what they compare it with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.hardware import GPUS

DATASHEET = GPUS["h200"].bandwidth  # bytes per second


def seconds(function: Callable, *arguments: Any, repeats: int) -> list[float]:
    """Of each call, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return times
