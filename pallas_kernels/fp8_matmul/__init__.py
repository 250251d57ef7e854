"""Block-FP8 weights: one op, `fp8_matmul`, for every backend."""

from pallas_kernels.fp8_matmul.api import BACKENDS, choose, fp8_matmul
from pallas_kernels.fp8_matmul.reference import BLOCK

__all__ = ["BACKENDS", "BLOCK", "choose", "fp8_matmul"]
