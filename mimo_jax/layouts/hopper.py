"""Packed weights with the experts as the Hopper kernel reads them: the same bits, rearranged once, at load."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
from jax.sharding import Mesh

from mimo_jax.config.model import ModelConfig
from mimo_jax.layouts import packed
from mimo_jax.sharding import TENSOR, shardings
from mimo_jax.weights import MxTensor, Params
from mimo_jax.weights.params import STACKS, is_moe, with_experts
from pallas_kernels.expert_matmul import HopperExperts, to_hopper, unfit

KERNEL = "mosaic_gpu"  # the backend that reads this layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HopperStacks(packed.PackedStacks):
    """The experts of a layer as int32 [experts, K splits, stages, words], and the backend that multiplies them."""

    experts: HopperExperts

    def axes(self) -> HopperStacks:
        gate_up, down = ("experts", None, "expert_features", None), ("experts", "expert_features", None, None)
        return HopperStacks(HopperExperts(gate_up, down), self.backend)


def reason_against(config: ModelConfig, params: Params, mesh: Mesh | None) -> str | None:
    """What keeps the kernel from serving these parameters, each device's part of them."""
    ways = 1 if mesh is None else mesh.shape[TENSOR]
    for node in jax.tree.leaves(params, is_leaf=is_moe):
        if not is_moe(node):
            continue
        if not isinstance(node["gate"], MxTensor):
            return "its experts are not stored in MXFP4"
        scales = {name: node[name].scales for name in STACKS}
        if reason := unfit(config.hidden_size, config.moe_intermediate_size // ways, scales):
            return reason
    return None


def pack(
    config: ModelConfig, params: Params, backend: str | None = None, mesh: Mesh | None = None, consume: bool = False
) -> tuple[ModelConfig, Params]:
    """Parameters whose experts are MXFP4.

    `consume` frees each packed stack once it is rearranged: a GPU does not hold all experts of a large model twice.
    """
    rearranged = partial(_rearranged, backend=backend, mesh=mesh, consume=consume)
    params = jax.tree.map(lambda node: rearranged(node) if is_moe(node) else node, params, is_leaf=is_moe)
    return packed.pack(config, params, backend)


def _rearranged(node: Params, backend: str | None, mesh: Mesh | None, consume: bool) -> Params:
    stacks = packed.packed_experts(node)
    places = None
    if mesh is not None:
        abstract = jax.eval_shape(lambda packed: HopperStacks(to_hopper(packed), backend), stacks)
        places = shardings(abstract, mesh).experts
    experts = jax.block_until_ready(jax.jit(to_hopper, out_shardings=places)(stacks))
    if consume:
        for leaf in jax.tree.leaves(stacks):
            if isinstance(leaf, jax.Array):
                leaf.delete()
    return with_experts(node, HopperStacks(experts, backend))
