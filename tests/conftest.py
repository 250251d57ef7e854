"""Shared set-up: tests run on the CPU unless a platform is named, and those that need something absent say so."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_enable_compilation_cache", False)  # a test that runs a command would fill the user's
if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)  # simulated: tests of sharding spread arrays over them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where JAX sees none."""
    if not any(item.get_closest_marker("gpu") for item in items) or jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
