"""Packed experts in the order in which the Hopper kernel reads them: the same bits, rearranged once, at load."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from mimo_jax.config import ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.modeling.layers import Params
from mimo_jax.sharding import TENSOR, TILED_EXPERTS, spec_of
from pallas_kernels.devices import on_hopper
from pallas_kernels.expert_matmul import BACKENDS, PackedExperts, TiledExperts, layout, tile_experts

KERNEL = "mosaic_gpu"
STACKS = ("gate", "up", "down")


def tile_params(
    config: ModelConfig, params: Params, mesh: Mesh | None = None, consume: bool = False
) -> tuple[ModelConfig, Params]:
    """Parameters of storage "mxfp4" as storage "tiled", if that kernel is to multiply the experts; else as they are.

    It is when `config.expert_backend` names it, or names none on a Hopper GPU whose kernel can serve the model.
    `consume` frees each packed stack once its tiles are there: a GPU does not hold all experts of a large model twice.
    """
    if not wants_tiles(config):
        return config, params
    try:
        _check(config, params, mesh)
    except ValueError as error:
        if config.expert_backend is None:
            return config, params
        raise UserError(f"experts: backend {KERNEL!r} cannot serve this model: {error}") from None
    tiled = jax.tree.map(partial(_tiled, mesh=mesh, consume=consume), params, is_leaf=_is_moe)
    return dataclasses.replace(config, storage="tiled"), tiled


def wants_tiles(config: ModelConfig) -> bool:
    """Whether the kernel that reads tiles is named, or none is and the device has it."""
    backend = config.expert_backend
    if backend is not None and backend not in BACKENDS:
        raise UserError(f"experts: backend {backend!r} is unknown; known: {', '.join(BACKENDS)}")
    return on_hopper() if backend is None else backend == KERNEL


def abstract_tiled(params: Params) -> Params:
    """The tree of `tile_params` for a tree of shapes and dtypes, without shardings."""

    def tiled(node: Any) -> Any:
        return jax.eval_shape(partial(_tiled, mesh=None, consume=False), node) if _is_moe(node) else node

    return jax.tree.map(tiled, params, is_leaf=_is_moe)


def _is_moe(node: Any) -> bool:
    return isinstance(node, dict) and "router" in node


def _check(config: ModelConfig, params: Params, mesh: Mesh | None) -> None:
    """ValueError unless each device's part can be tiled and multiplied."""
    ways = 1 if mesh is None else mesh.shape[TENSOR]
    layout.gate_up_tiling(config.hidden_size, config.moe_intermediate_size // ways)
    layout.down_tiling(config.hidden_size, config.moe_intermediate_size // ways)
    for node in jax.tree.leaves(params, is_leaf=_is_moe):
        if _is_moe(node):
            for name in STACKS:
                layout.check_scales(node[name].scales, name)


def _tiled(node: Any, mesh: Mesh | None, consume: bool) -> Any:
    """A layer of experts with its three stacks as tiles, where they are; anything else as it is."""
    if not _is_moe(node):
        return node
    places = None
    if mesh is not None:
        places = TiledExperts(*(NamedSharding(mesh, spec_of(axes)) for axes in TILED_EXPERTS.values()))
    packed = PackedExperts(*((node[name].codes, node[name].scales) for name in STACKS))
    tiles = jax.block_until_ready(jax.jit(tile_experts, out_shardings=places)(packed))
    if consume:
        for leaf in jax.tree.leaves(packed):
            if isinstance(leaf, jax.Array):
                leaf.delete()
    return {name: leaf for name, leaf in node.items() if name not in STACKS} | {"tiles": tiles}
