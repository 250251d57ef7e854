"""What JAX's default device is."""

from __future__ import annotations

import jax

HOPPER = 90


def capability() -> int | None:
    """Ten times the compute capability of an NVIDIA GPU; None for anything else."""
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
    return 10 * int(major) + int(minor) if major.isdigit() and minor.isdigit() else None


def on_hopper() -> bool:
    """Whether it is an H100, H200 or the like."""
    return capability() == HOPPER
