"""The decode step as one table of work: what is in it, who does it, and checks and forecasts of it."""

from pallas_kernels.decode_step.assigned import ROLES, assigned_rows, shard_of
from pallas_kernels.decode_step.geometry import Drafter, Layer, Target
from pallas_kernels.decode_step.native.api import (
    CHUNK,
    NORMALLY,
    DraftCache,
    Packed,
    Running,
    TargetCache,
    draft,
    init_cache,
    init_draft_cache,
    least_kept,
    read_stream,
    step,
    update_context,
)
from pallas_kernels.decode_step.native.build import unavailable, usable_paths
from pallas_kernels.decode_step.native.layout import (
    DRAFT_LAYER_SLOTS,
    DRAFT_TOP_SLOTS,
    LAYER_SLOTS,
    TOP_SLOTS,
    Blob,
    Stored,
    joined,
    stored_fp8,
)
from pallas_kernels.decode_step.schedule import step_phases
from pallas_kernels.decode_step.simulate import END, HOPPER, Costs, Timeline, layer_of, sensitivity
from pallas_kernels.decode_step.simulate import simulate as timeline_of

__all__ = [
    "CHUNK",
    "DRAFT_LAYER_SLOTS",
    "DRAFT_TOP_SLOTS",
    "END",
    "HOPPER",
    "LAYER_SLOTS",
    "NORMALLY",
    "ROLES",
    "TOP_SLOTS",
    "Blob",
    "Costs",
    "DraftCache",
    "Drafter",
    "Layer",
    "Packed",
    "Running",
    "Stored",
    "Target",
    "TargetCache",
    "Timeline",
    "assigned_rows",
    "draft",
    "init_cache",
    "init_draft_cache",
    "joined",
    "layer_of",
    "least_kept",
    "read_stream",
    "sensitivity",
    "shard_of",
    "step",
    "step_phases",
    "stored_fp8",
    "timeline_of",
    "unavailable",
    "update_context",
    "usable_paths",
]
