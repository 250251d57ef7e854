"""The routed SwiGLU experts: `pallas_kernels.expert_matmul` for packed ones, its plain JAX for every other storage."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.quantization import MxTensor, dequantize
from mimo_jax.sharding import EXPERT, EXPERTS, REPLICA, TILED_EXPERTS, current_mesh, spec_of
from pallas_kernels.expert_matmul import PackedExperts, TiledExperts, expert_ffn
from pallas_kernels.expert_matmul.reference import (
    DECODE_TOKENS,
    STORED,
    TURNED,
    coefficients,
    grouped,
    swiglu,
    touched_only,
)

# gate [E, F, D], up [E, F, D], down [E, D, F]: each a `Weight` stack; or unpacked, tuples of E matrices the other way
# round (gate [D, F]), which XLA on CPU multiplies a block of 8 tokens with in two thirds of the time (docs/LOG.md);
# or all three in the tiles of the Hopper kernel.
Experts = tuple[Any, Any, Any] | TiledExperts


def routed_ffn(
    x_TD: Float[Array, "T D"],
    ids_TX: Int[Array, "T X"],
    weights_TX: Float[Array, "T X"],
    experts: Experts,
    backend: str | None = None,
) -> Float[Array, "T D"]:
    """sum_x weights[t, x] * expert[ids[t, x]](x[t]), combined in float32. No token is dropped at any imbalance.

    `backend` is one of `pallas_kernels.expert_matmul.BACKENDS`, for packed experts; by default the device decides.
    """

    on_device = functools.partial(_routed_ffn, backend=backend)
    mesh = current_mesh()
    if mesh is None:
        return on_device(x_TD, ids_TX, weights_TX, experts).astype(x_TD.dtype)

    def partial_ffn(x_TD: Array, ids_TX: Array, weights_TX: Array, experts: Experts) -> Array:
        """The whole sum, on devices that each hold some experts, or some features of them."""
        held = _count(experts)
        mine_TX = ids_TX - jax.lax.axis_index(EXPERT) * held
        is_mine_TX = (mine_TX >= 0) & (mine_TX < held)
        mine_TX, weights_TX = jnp.where(is_mine_TX, mine_TX, held), jnp.where(is_mine_TX, weights_TX, 0.0)
        return jax.lax.psum(on_device(x_TD, mine_TX, weights_TX, experts), REPLICA)

    # By hand: left to itself, the compiler reduces over the devices once per expert.
    tokens = spec_of(("batch", None))
    is_tiled = isinstance(experts, TiledExperts)
    axes = TILED_EXPERTS if is_tiled else EXPERTS
    specs = tuple(spec_of(axes[name]) for name in axes)
    in_specs = (tokens, tokens, tokens, TiledExperts(*specs) if is_tiled else specs)
    per_device = jax.shard_map(partial_ffn, in_specs=in_specs, out_specs=tokens, check_vma=False)
    return per_device(x_TD, ids_TX, weights_TX, experts).astype(x_TD.dtype)


def _count(experts: Experts) -> int:
    if isinstance(experts, TiledExperts):
        return experts.sizes[0]
    return len(experts[0]) if isinstance(experts[0], tuple) else experts[0].shape[0]


def _routed_ffn(x_TD: Array, ids_TX: Array, weights_TX: Array, experts: Experts, backend: str | None) -> Array:
    """`routed_ffn` in float32; an id past the last expert names none."""
    if isinstance(experts, TiledExperts):
        return expert_ffn(x_TD, ids_TX, weights_TX, experts, backend=backend)
    if all(isinstance(stack, MxTensor) for stack in experts):
        packed = PackedExperts(*((stack.codes, stack.scales) for stack in experts))
        return expert_ffn(x_TD, ids_TX, weights_TX, packed, backend=backend)
    is_unpacked = isinstance(experts[0], tuple)
    is_block = x_TD.shape[0] <= DECODE_TOKENS
    if is_unpacked and is_block:
        return _each_in_turn(x_TD, ids_TX, weights_TX, experts)
    stacks = tuple(jnp.stack(matrices) for matrices in experts) if is_unpacked else experts

    def read(expert: Array) -> tuple[Array, ...]:
        return tuple(dequantize(stack[expert], x_TD.dtype) for stack in stacks)

    if is_block:
        return touched_only(x_TD, ids_TX, weights_TX, read, _count(experts))
    return grouped(x_TD, ids_TX, weights_TX, read, _count(experts), TURNED if is_unpacked else STORED)


def _each_in_turn(x_TD: Array, ids_TX: Array, weights_TX: Array, experts: tuple[Any, Any, Any]) -> Array:
    """One branch per expert, closed over that expert's own arrays: nothing is copied, untouched experts not read."""
    y_TD = jnp.zeros(x_TD.shape, jnp.float32)
    for expert, matrices in enumerate(zip(*experts)):

        def visit(y: Array, expert=expert, matrices=matrices) -> Array:
            matrices = [dequantize(matrix, x_TD.dtype) for matrix in matrices]
            return y + coefficients(ids_TX, weights_TX, expert) * swiglu(x_TD, *matrices, axes=TURNED)

        y_TD = jax.lax.cond(jnp.any(ids_TX == expert), visit, lambda y: y, y_TD)
    return y_TD
