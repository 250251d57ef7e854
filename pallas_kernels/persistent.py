"""The persistent decode step of Hopper: what others need of `decode_step.hopper`.

Not among the names of `decode_step`, whose users do without Mosaic, which takes a second to import.
"""

from pallas_kernels.decode_step.hopper.config import FP8_SEGMENT, Matrix
from pallas_kernels.decode_step.hopper.machine import Buffers, Weights
from pallas_kernels.decode_step.hopper.plan import StepPlan
from pallas_kernels.decode_step.hopper.routing import pack_router
from pallas_kernels.decode_step.hopper.weights import pack, pack_down
from pallas_kernels.decode_step.schedule import Kind

__all__ = ["FP8_SEGMENT", "Buffers", "Kind", "Matrix", "StepPlan", "Weights", "pack", "pack_down", "pack_router"]
