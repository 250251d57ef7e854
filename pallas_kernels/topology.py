"""Devices of GPUs that are not there, for which XLA compiles all the same.

It needs the CUDA plugin and its compiler tools for that, but no GPU: a topology described by a text stands for the
machine.
"""

from __future__ import annotations

import importlib.metadata
import os

import jax

from pallas_kernels import triton_call
from pallas_kernels.hardware import Gpu

PACKAGES = {"jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"}
INSTALL = (
    "pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} nvidia-cuda-nvcc nvidia-nvvm "
    "jax-triton triton"
)
# What XLA asks of a machine that it compiles for.
_DESCRIPTION = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_memory_per_sm} \
shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  core_count: {gpu.sms} fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {gpu.bandwidth:.0f} device_memory_size: {gpu.memory:.0f} l2_cache_size: 52428800
  cuda_compute_capability {{ major: {gpu.capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  name: "NVIDIA {label}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {label}"
"""


def missing() -> str | None:
    """What keeps programs from being compiled for GPUs here, and the command that helps; None if nothing does."""
    if PACKAGES <= {distribution.name for distribution in importlib.metadata.distributions()}:
        return None
    return "compiling needs the CUDA plugin, which is not installed: " + INSTALL.format(version=jax.__version__)


def without_triton() -> str | None:
    """That the compiled programs lack the Triton kernels, and the command that helps; None if they have them."""
    if triton_call.is_installed():
        return None
    return "without the Triton kernels, which move fewer bytes: pip install --no-deps jax-triton triton"


def devices(gpu: Gpu, count: int) -> list[jax.Device]:
    """Those of a compile-only machine with so many GPUs of one kind."""
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be read back from it
    compilation_cache.reset_cache()  # which reads that option once
    description = target_description(gpu)
    topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology=f"1x1x{count}")
    return list(topology.devices)


def target_description(gpu: Gpu) -> str:
    """The text that stands for a GPU where programs are compiled without one, as XLA reads it."""
    return _DESCRIPTION.format(gpu=gpu, label=gpu.name.upper())
