"""How much memory this process holds and held."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import jax

from mimo_jax.errors import UserError


def total_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(nbytes: float, what: str) -> None:
    """Raises where the CPU's memory cannot hold `nbytes`: the system would end this process without a word."""
    total = total_memory()
    if jax.default_backend() == "cpu" and nbytes > total:
        raise UserError(f"memory: {what} takes {nbytes / 1e9:,.0f} GB at least; this machine has {total / 1e9:,.0f} GB")


def return_freed_memory() -> None:
    """Makes glibc hand freed blocks back at once: it may keep those below 32 MB, a quarter of a small checkpoint."""
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 16)


def current_memory() -> int:
    """Resident bytes of this process now, with JAX started."""
    jax.devices()
    return _status("VmRSS") or peak_memory()


def peak_memory() -> int:
    """The most bytes this process ever had resident."""
    # ru_maxrss alone would do, but a process inherits it from the one that started it.
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int | None:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
