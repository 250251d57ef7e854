"""What kind of GPU programs are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

HOPPER = 90
# Capability of a GPU that is not here. JAX keeps what was traced for each apart; a ContextVar's value it would not see.
_absent = jax.make_user_context()


@contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Programs lowered inside are for GPUs of this kind (90 for Hopper), which need not be here."""
    with _absent(capability):
        yield


def capability() -> int | None:
    """Ten times the compute capability of JAX's default device, if it is an NVIDIA GPU, or of `compiling_for`'s."""
    if (absent := _absent.value) is not None:
        return absent
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
    return 10 * int(major) + int(minor) if major.isdigit() and minor.isdigit() else None


def on_hopper() -> bool:
    """Whether it is an H100, H200 or the like."""
    return capability() == HOPPER
