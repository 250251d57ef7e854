"""Shared set-up: tests run on the CPU unless a platform is named, and those that need something absent say so."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:
    # One cache of compiled programs for the processes of a run, and for the commands that they start.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mimo-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jaxtyping
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import tests.shapes  # noqa: F401  the hook below names it

ROOT = Path(__file__).parents[1]
# All but the packages themselves, whose names stand for everything below, and what Triton's interpreter must find bare.
CHECKED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("mimo_jax", "pallas_kernels")
    for path in (ROOT / package).rglob("*.py")
    if path.name not in ("__init__.py", "triton_kernels.py")
]
# Both before any module of ours is imported. JAX takes NumPy's arrays wherever it takes its own, and so do we.
jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook(CHECKED, "tests.shapes.check")

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)  # simulated: tests of sharding spread arrays over them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where JAX sees none."""
    if not any(item.get_closest_marker("gpu") for item in items) or jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Compiled programs go with their module: each maps memory, of which a process may have only so many pieces
    (`vm.max_map_count`), and dies at the next. Modules that compile for absent devices turn the cache off.
    """
    yield
    jax.clear_caches()
    if not jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked: for arguments that they forbid, which our own errors must name."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
