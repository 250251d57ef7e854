"""What kind of GPU programs are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

HOPPER = 90
_absent: ContextVar[int | None] = ContextVar("capability of a GPU that is not here", default=None)


@contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Programs lowered inside are for GPUs of this kind (90 for Hopper), which need not be here."""
    token = _absent.set(capability)
    try:
        yield
    finally:
        _absent.reset(token)


def capability() -> int | None:
    """Ten times the compute capability of JAX's default device, if it is an NVIDIA GPU, or of `compiling_for`'s."""
    if (absent := _absent.get()) is not None:
        return absent
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
    return 10 * int(major) + int(minor) if major.isdigit() and minor.isdigit() else None


def on_hopper() -> bool:
    """Whether it is an H100, H200 or the like."""
    return capability() == HOPPER
