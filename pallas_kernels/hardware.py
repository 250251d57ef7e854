"""GPUs that kernels and plans are made for. Vendors' datasheet values (SXM modules); nothing here was measured."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Per device: bytes of memory, bytes per second from it, dense BF16 operations per second."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    sms: int
    capability: int  # major version of the compute capability
    shared_memory_per_sm: int = 228 * 1024  # bytes
    shared_memory_per_block: int = 227 * 1024  # that a kernel may ask for

    @property
    def arch(self) -> str:
        """As ptxas names it, with the instructions that only this generation has."""
        return f"sm_{self.capability}0a"


GPUS = {
    "h100": Gpu("h100", 80e9, 3.35e12, 989e12, 132, 9),
    "h200": Gpu("h200", 141e9, 4.8e12, 989e12, 132, 9),
    "b200": Gpu("b200", 180e9, 8.0e12, 2250e12, 148, 10),
}
