"""The persistent decode step of Hopper: what others need of `decode_step.hopper`.

Not among the names of `decode_step`, whose users do without Mosaic, which takes a second to import.
"""

from pallas_kernels.decode_step.hopper.config import FORMATS, FP8_SEGMENT, Matrix, code_words
from pallas_kernels.decode_step.hopper.machine import STAMPS, Buffers, Weights
from pallas_kernels.decode_step.hopper.mosaic_gpu import launch
from pallas_kernels.decode_step.hopper.plan import MOST_TOKENS, PUBLISHED, StepPlan
from pallas_kernels.decode_step.hopper.routing import pack_router
from pallas_kernels.decode_step.hopper.state import buffer_shapes, times_shape, weight_shapes, zeros
from pallas_kernels.decode_step.hopper.sync import given_up
from pallas_kernels.decode_step.hopper.table import Op, Table, table_of
from pallas_kernels.decode_step.hopper.weights import LARGEST_SCALE, pack, pack_down, pack_gains, scale_word
from pallas_kernels.decode_step.schedule import Kind

__all__ = [
    "FORMATS",
    "FP8_SEGMENT",
    "LARGEST_SCALE",
    "MOST_TOKENS",
    "PUBLISHED",
    "STAMPS",
    "Buffers",
    "Kind",
    "Matrix",
    "Op",
    "StepPlan",
    "Table",
    "Weights",
    "buffer_shapes",
    "code_words",
    "given_up",
    "launch",
    "pack",
    "pack_down",
    "pack_gains",
    "pack_router",
    "scale_word",
    "table_of",
    "times_shape",
    "weight_shapes",
    "zeros",
]
