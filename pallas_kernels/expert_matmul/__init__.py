"""MXFP4 experts: one op, `expert_ffn`, for every backend."""

from pallas_kernels.expert_matmul.api import BACKENDS, expert_ffn
from pallas_kernels.expert_matmul.layout import PackedExperts, TiledExperts, tile_experts, untile_experts

__all__ = ["BACKENDS", "PackedExperts", "TiledExperts", "expert_ffn", "tile_experts", "untile_experts"]
