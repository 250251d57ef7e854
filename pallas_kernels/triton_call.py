"""Calls kernels in Triton's language through jax-triton, which is imported when it is used."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from typing import Any

import jax

from pallas_kernels import sass
from pallas_kernels.devices import capability

OLDEST = 80  # compute capability, ten times: Ampere


def is_installed() -> bool:
    """Whether jax-triton can be imported."""
    return importlib.util.find_spec("jax_triton") is not None


def missing() -> str | None:
    """What keeps Triton kernels from running here, or from being compiled for `compiling_for`'s GPU."""
    if not is_installed():
        return f"jax-triton is not installed (the extra `triton`); JAX's default device is {jax.default_backend()!r}"
    if (capability() or 0) < OLDEST:
        return f"JAX's default device is {jax.devices()[0].device_kind!r}, not an NVIDIA GPU from Ampere on"
    return None


@functools.cache
def _prefer_packaged_assembler() -> None:
    """XLA takes the first ptxas on the PATH, which may be too old for what Triton writes; the package's is not."""
    if (assembler := sass.tool("ptxas")) is not None:
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(assembler), os.environ.get("PATH", "")])


def call(
    kernel: Any,
    *arrays: jax.Array,
    out: Any,
    grid: tuple[int, ...],
    warps: int = 4,
    stages: int = 3,
    **constants: int | float,
) -> Any:
    """Arrays of the shapes and dtypes `out`, which the kernel takes as its last pointers; for `devices.capability`."""
    import jax_triton

    _prefer_packaged_assembler()
    # jax-triton 0.4 renamed it.
    result = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        grid=grid,
        compute_capability=capability(),
        num_warps=warps,
        num_stages=stages,
        **{result: out},
        **constants,
    )
