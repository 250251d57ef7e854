"""MXFP4 experts: one op, `expert_ffn`, for every backend; and its plain JAX for experts that are stored otherwise."""

from pallas_kernels.expert_matmul.api import BACKENDS, expert_ffn
from pallas_kernels.expert_matmul.hopper_layout import (
    HopperExperts,
    PackedExperts,
    alternate,
    from_hopper,
    to_hopper,
    unfit,
    unfit_scales,
)
from pallas_kernels.expert_matmul.reference import DECODE_TOKENS, ffn_of

__all__ = [
    "BACKENDS",
    "DECODE_TOKENS",
    "HopperExperts",
    "PackedExperts",
    "alternate",
    "expert_ffn",
    "ffn_of",
    "from_hopper",
    "to_hopper",
    "unfit",
    "unfit_scales",
]
