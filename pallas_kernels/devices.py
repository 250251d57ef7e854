"""What kind of GPU programs are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from pallas_kernels.hardware import GPUS

HOPPER = 10 * GPUS["h200"].capability
# The capability of a GPU that is not here. Not a ContextVar, which jit does not see: it would find traces for another.
_absent = jax.make_user_context(default_value=None)


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
