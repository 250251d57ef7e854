"""GPUs to plan for. Vendors' datasheet values (SXM modules); nothing here was measured."""

from __future__ import annotations

import dataclasses
import re

from mimo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Per device: bytes of memory, bytes per second from it, dense BF16 operations per second."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    cores: int
    capability: int  # major version of the compute capability


GPUS = {
    "h100": Gpu("h100", 80e9, 3.35e12, 989e12, 132, 9),
    "h200": Gpu("h200", 141e9, 4.8e12, 989e12, 132, 9),
    "b200": Gpu("b200", 180e9, 8.0e12, 2250e12, 148, 10),
}
MOST = 16
# What XLA asks of a machine that it compiles for; a target description as its compile-only topologies read it.
_DESCRIPTION = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f} l2_cache_size: 52428800
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  name: "NVIDIA {label}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {label}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """`count` GPUs of one kind."""

    gpu: Gpu
    count: int

    def __str__(self) -> str:
        return f"{self.count}x{self.gpu.name.upper()}"


def parse_target(text: str) -> Target:
    """A target from words like "8xh200"."""
    match = re.fullmatch(r"(\d+)x(\w+)", text.lower())
    if match is None or match[2] not in GPUS or not 1 <= int(match[1]) <= MOST:
        raise UserError(f"target {text!r} must be COUNTxGPU, 1 to {MOST} of {', '.join(GPUS)}; for example 8xh200")
    return Target(GPUS[match[2]], int(match[1]))


def target_description(gpu: Gpu) -> str:
    """The text that stands for a GPU where programs are compiled without one."""
    return _DESCRIPTION.format(**dataclasses.asdict(gpu), label=gpu.name.upper())
