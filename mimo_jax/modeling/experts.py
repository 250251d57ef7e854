"""The routed SwiGLU experts under XLA: three ways to visit them, one result.

Expert stacks are indexed, never sliced whole: a gather of rows per token, or a slice of a layer's stack, moves more
bytes than the mathematics (docs/LOG.md).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.quantization import dequantize
from mimo_jax.sharding import EXPERT, EXPERTS, REPLICA, current_mesh, spec_of

DECODE_TOKENS = 16  # up to here, experts are visited one by one
GROUP_ROWS = 256  # rows per block of one expert when many tokens are grouped

# gate [E, F, D], up [E, F, D], down [E, D, F]: each a `Weight` stack; or unpacked, tuples of E matrices the other way
# round (gate [D, F]), which XLA on CPU multiplies a block of 8 tokens with in two thirds of the time (docs/LOG.md).
Experts = tuple[Any, Any, Any]
STORED, UNPACKED = "nk", "kn"  # output and input axes of a matrix


def routed_ffn(
    x_TD: Float[Array, "T D"], ids_TX: Int[Array, "T X"], weights_TX: Float[Array, "T X"], experts: Experts
) -> Float[Array, "T D"]:
    """sum_x weights[t, x] * expert[ids[t, x]](x[t]), combined in float32. No token is dropped at any imbalance."""
    mesh = current_mesh()
    if mesh is None:
        return _routed_ffn(x_TD, ids_TX, weights_TX, experts).astype(x_TD.dtype)
    # By hand: left to itself, the compiler reduces over the devices once per expert.
    tokens = spec_of(("batch", None))
    specs = (tokens, tokens, tokens, tuple(spec_of(axes) for axes in EXPERTS.values()))
    per_device = jax.shard_map(_partial_ffn, in_specs=specs, out_specs=tokens, check_vma=False)
    return per_device(x_TD, ids_TX, weights_TX, experts).astype(x_TD.dtype)


def _partial_ffn(x_TD: Array, ids_TX: Array, weights_TX: Array, experts: Experts) -> Array:
    """The whole sum, on devices that each hold some experts, or some features of them."""
    held = experts[0].shape[0]
    mine_TX = ids_TX - jax.lax.axis_index(EXPERT) * held
    is_mine_TX = (mine_TX >= 0) & (mine_TX < held)
    mine_TX, weights_TX = jnp.where(is_mine_TX, mine_TX, held), jnp.where(is_mine_TX, weights_TX, 0.0)
    return jax.lax.psum(_routed_ffn(x_TD, mine_TX, weights_TX, experts), REPLICA)


def _routed_ffn(x_TD: Array, ids_TX: Array, weights_TX: Array, experts: Experts) -> Array:
    """`routed_ffn` in float32; an id past the last expert names none."""
    unpacked = isinstance(experts[0], tuple)
    if x_TD.shape[0] > DECODE_TOKENS:
        stacks: Any = tuple(jnp.stack(matrices) for matrices in experts) if unpacked else experts
        return _grouped(x_TD, ids_TX, weights_TX, stacks, UNPACKED if unpacked else STORED)
    visit = _each_in_turn if unpacked else _touched_only
    return visit(x_TD, ids_TX, weights_TX, experts)


def _swiglu(x: Array, gate: Array, up: Array, down: Array, *, axes: str = STORED) -> Array:
    def matmul(a: Array, w: Array) -> Array:
        return jnp.einsum(f"...tk,...{axes}->...tn", a, w, preferred_element_type=jnp.float32)

    hidden = (nn.silu(matmul(x, gate)) * matmul(x, up)).astype(x.dtype)
    return matmul(hidden, down)


def _coefficients(ids_TX: Array, weights_TX: Array, expert: Array | int) -> Array:
    return jnp.sum(jnp.where(ids_TX == expert, weights_TX, 0.0), axis=-1, keepdims=True)


def _each_in_turn(x_TD: Array, ids_TX: Array, weights_TX: Array, experts: Experts) -> Array:
    """One branch per expert, closed over that expert's own arrays: nothing is copied, untouched experts not read."""
    y_TD = jnp.zeros(x_TD.shape, jnp.float32)
    for expert, matrices in enumerate(zip(*experts)):

        def visit(y: Array, expert=expert, matrices=matrices) -> Array:
            matrices = [dequantize(matrix, x_TD.dtype) for matrix in matrices]
            return y + _coefficients(ids_TX, weights_TX, expert) * _swiglu(x_TD, *matrices, axes=UNPACKED)

        y_TD = jax.lax.cond(jnp.any(ids_TX == expert), visit, lambda y: y, y_TD)
    return y_TD


def _touched_only(x_TD: Array, ids_TX: Array, weights_TX: Array, experts: Experts) -> Array:
    """A loop over the distinct experts of the block, each read and expanded once."""
    num_experts = experts[0].shape[0]
    touched = jnp.unique(ids_TX, size=min(num_experts, ids_TX.size), fill_value=num_experts)

    def visit(index: Array, y: Array) -> Array:
        expert = touched[index]
        matrices = [dequantize(stack[expert], x_TD.dtype) for stack in experts]
        return y + _coefficients(ids_TX, weights_TX, expert) * _swiglu(x_TD, *matrices)

    count = jnp.sum(touched < num_experts)
    return jax.lax.fori_loop(0, count, visit, jnp.zeros(x_TD.shape, jnp.float32))


def _grouped(x_TD: Array, ids_TX: Array, weights_TX: Array, experts: Experts, axes: str = STORED) -> Array:
    """Sorts (token, expert) pairs by expert into blocks of one expert each, so that every product is a plain matmul."""
    tokens, chosen = ids_TX.shape
    num_experts, pairs = experts[0].shape[0], tokens * chosen
    rows = min(GROUP_ROWS, -(-pairs // num_experts))
    blocks = pairs // rows + num_experts  # enough for any imbalance
    block_expert, slot_of_pair = _assign_slots(ids_TX.reshape(-1), num_experts, rows, blocks)
    pair_of_slot = jnp.full(blocks * rows, pairs).at[slot_of_pair].set(jnp.arange(pairs), unique_indices=True)

    x_PD = jnp.broadcast_to(x_TD[:, None], (tokens, chosen, x_TD.shape[-1])).reshape(pairs, -1)
    x_BRD = _permute(x_PD, pair_of_slot, slot_of_pair).reshape(blocks, rows, -1)
    matrices = [dequantize(stack[block_expert], x_TD.dtype) for stack in experts]
    y_SD = _swiglu(x_BRD, *matrices, axes=axes).reshape(blocks * rows, -1)
    y_TXD = _permute(y_SD, slot_of_pair, pair_of_slot).reshape(tokens, chosen, -1)
    return jnp.sum(y_TXD * weights_TX[..., None], axis=1)


def _assign_slots(ids_P: Array, num_experts: int, rows: int, blocks: int) -> tuple[Array, Array]:
    """The expert of each block, and for each pair its row among all blocks' rows; past the last for no expert."""
    order_P = jnp.argsort(ids_P, stable=True)
    counts_E = jnp.bincount(ids_P, length=num_experts)
    blocks_E = -(-counts_E // rows)
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    first_pair_E = jnp.cumsum(counts_E) - counts_E
    sorted_ids_P = ids_P[order_P]
    sorted_slot_P = first_block_E[sorted_ids_P] * rows + jnp.arange(ids_P.size) - first_pair_E[sorted_ids_P]
    slot_P = jnp.zeros_like(sorted_slot_P).at[order_P].set(sorted_slot_P, unique_indices=True)
    block_expert = jnp.searchsorted(jnp.cumsum(blocks_E), jnp.arange(blocks), side="right")
    nowhere_P = blocks * rows + jnp.arange(ids_P.size)
    return jnp.minimum(block_expert, num_experts - 1), jnp.where(ids_P < num_experts, slot_P, nowhere_P)


@jax.custom_vjp
def _permute(rows: Array, index: Array, inverse: Array) -> Array:
    """rows[index], zero where out of range. The gradient is a gather by `inverse`: XLA's scatter-add is far slower."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _permute_forward(rows: Array, index: Array, inverse: Array):
    return _permute(rows, index, inverse), inverse


def _permute_backward(inverse: Array, gradient: Array):
    return jnp.take(gradient, inverse, axis=0, mode="fill", fill_value=0), None, None


_permute.defvjp(_permute_forward, _permute_backward)
