"""The op in plain JAX, for any stack that can be read expert by expert: what CPUs run, and what kernels must equal.

Few tokens: a loop over the distinct experts, each read and expanded once. Many: pairs sorted by expert into blocks of
one expert each. Stacks are indexed, never sliced whole: a gather of rows per token, or a slice of a layer's stack,
moves more bytes than the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import mxfp4
from pallas_kernels.expert_matmul.layout import PackedExperts, TiledExperts, untile_experts

DECODE_TOKENS = 16  # up to here, experts are visited one by one
GROUP_ROWS = 256  # rows per block of one expert when many tokens are grouped

# Expert number(s) -> gate [..., F, D], up [..., F, D] and down [..., D, F], in the dtype of the activations.
Read = Callable[[Array], tuple[Array, ...]]
STORED, TURNED = "nk", "kn"  # output and input axes of a matrix


def unsupported(x_TD: Array, ids_TX: Array, experts: PackedExperts | TiledExperts) -> None:
    """Nothing is."""


def expert_ffn(
    x_TD: Float[Array, "T D"],
    ids_TX: Int[Array, "T X"],
    weights_TX: Float[Array, "T X"],
    experts: PackedExperts | TiledExperts,
    first: int,
    num_experts: int,
) -> Float[Array, "T D"]:
    """`api.expert_ffn` on rows `first` and following of the stacks."""
    visit = touched_only if x_TD.shape[0] <= DECODE_TOKENS else grouped
    return visit(x_TD, ids_TX, weights_TX, reader(experts, x_TD.dtype, first), num_experts)


def reader(experts: PackedExperts | TiledExperts, dtype, first: int = 0) -> Read:
    """Reads and expands single experts, or an array of them."""

    def read(expert: Array) -> tuple[Array, ...]:
        index = jnp.atleast_1d(expert) + first
        chosen = jax.tree.map(lambda stack: stack[index], experts)
        packed = untile_experts(chosen) if isinstance(chosen, TiledExperts) else chosen
        pairs = (packed.gate, packed.up, packed.down)
        matrices = [mxfp4.decode(mxfp4.unpack(codes), scales).astype(dtype) for codes, scales in pairs]
        return tuple(matrix if expert.ndim else matrix[0] for matrix in matrices)

    return read


def swiglu(x: Array, gate: Array, up: Array, down: Array, *, axes: str = STORED) -> Array:
    """In float32, but for the hidden activations, which are rounded to the dtype of `x`."""

    def matmul(a: Array, w: Array) -> Array:
        return jnp.einsum(f"...tk,...{axes}->...tn", a, w, preferred_element_type=jnp.float32)

    hidden = (jax.nn.silu(matmul(x, gate)) * matmul(x, up)).astype(x.dtype)
    return matmul(hidden, down)


def coefficients(ids_TX: Array, weights_TX: Array, expert: Array | int) -> Array:
    """What each token multiplies an expert's output with."""
    return jnp.sum(jnp.where(ids_TX == expert, weights_TX, 0.0), axis=-1, keepdims=True)


def touched_only(x_TD: Array, ids_TX: Array, weights_TX: Array, read: Read, num_experts: int) -> Array:
    """A loop over the distinct experts of the block, each read and expanded once."""
    touched = jnp.unique(ids_TX, size=min(num_experts, ids_TX.size), fill_value=num_experts)

    def visit(index: Array, y: Array) -> Array:
        expert = touched[index]
        return y + coefficients(ids_TX, weights_TX, expert) * swiglu(x_TD, *read(expert))

    count = jnp.sum(touched < num_experts)
    return jax.lax.fori_loop(0, count, visit, jnp.zeros(x_TD.shape, jnp.float32))


def grouped(x_TD: Array, ids_TX: Array, weights_TX: Array, read: Read, num_experts: int, axes: str = STORED) -> Array:
    """Sorts (token, expert) pairs by expert into blocks of one expert each, so that every product is a plain matmul."""
    tokens, chosen = ids_TX.shape
    pairs = tokens * chosen
    rows = min(GROUP_ROWS, -(-pairs // num_experts))
    blocks = pairs // rows + num_experts  # enough for any imbalance
    block_expert, slot_of_pair = assign_slots(ids_TX.reshape(-1), num_experts, rows, blocks)
    pair_of_slot = jnp.full(blocks * rows, pairs).at[slot_of_pair].set(jnp.arange(pairs), unique_indices=True)

    x_PD = jnp.broadcast_to(x_TD[:, None], (tokens, chosen, x_TD.shape[-1])).reshape(pairs, -1)
    x_BRD = _permute(x_PD, pair_of_slot, slot_of_pair).reshape(blocks, rows, -1)
    y_SD = swiglu(x_BRD, *read(block_expert), axes=axes).reshape(blocks * rows, -1)
    y_TXD = _permute(y_SD, slot_of_pair, pair_of_slot).reshape(tokens, chosen, -1)
    return jnp.sum(y_TXD * weights_TX[..., None], axis=1)


def assign_slots(ids_P: Array, num_experts: int, rows: int, blocks: int) -> tuple[Array, Array]:
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


def most_blocks(pairs: int, num_experts: int, columns: int) -> int:
    """Enough for any imbalance: full blocks, and one that is not for each expert that has any pair."""
    return min(pairs, pairs // columns + num_experts)


def blocks_of(ids_TX: Array, num_experts: int, columns: int) -> tuple[Array, Array]:
    """The expert of each block of `columns` slots, and the pair in each slot (-1 for none)."""
    blocks = most_blocks(ids_TX.size, num_experts, columns)
    expert_B, slot_P = assign_slots(ids_TX.reshape(-1), num_experts, columns, blocks)
    pair_S = jnp.full(blocks * columns, -1, jnp.int32)
    pair_S = pair_S.at[slot_P].set(jnp.arange(ids_TX.size, dtype=jnp.int32), mode="drop", unique_indices=True)
    return expert_B.astype(jnp.int32), pair_S


@jax.custom_vjp
def _permute(rows: Array, index: Array, inverse: Array) -> Array:
    """rows[index], zero where out of range. The gradient is a gather by `inverse`: XLA's scatter-add is far slower."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _permute_forward(rows: Array, index: Array, inverse: Array):
    return _permute(rows, index, inverse), inverse


def _permute_backward(inverse: Array, gradient: Array):
    return jnp.take(gradient, inverse, axis=0, mode="fill", fill_value=0), None, None


_permute.defvjp(_permute_forward, _permute_backward)
