"""The machine that a plan is made for."""

from __future__ import annotations

import dataclasses
import re

from mimo_jax.errors import UserError
from pallas_kernels.hardware import GPUS, Gpu

MOST = 16  # GPUs


@dataclasses.dataclass(frozen=True)
class Target:
    """`count` GPUs of one kind."""

    gpu: Gpu
    count: int

    def __str__(self) -> str:
        return f"{self.count}x{self.gpu.name.upper()}"


def parse_target(text: str) -> Target:
    """A target from words like "8xh200"."""
    match = re.fullmatch(r"(\d{1,3})x(\w+)", text.lower())
    if match is None or match[2] not in GPUS or not 1 <= int(match[1]) <= MOST:
        raise UserError(f"target {text!r} must be COUNTxGPU, 1 to {MOST} of {', '.join(GPUS)}; for example 8xh200")
    return Target(GPUS[match[2]], int(match[1]))
