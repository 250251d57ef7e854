"""The op in plain JAX, for any stack that can be read expert by expert: what CPUs run, and what kernels must equal.

Few tokens: a loop over the distinct experts, each read and expanded once. Many: pairs sorted by expert into work groups
of one expert each. Stacks are indexed, never sliced whole: a gather of rows per token, or a slice of a layer's stack,
moves more bytes than the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import mxfp4
from pallas_kernels.backends import Shaped
from pallas_kernels.expert_matmul.hopper_layout import HopperExperts, PackedExperts, from_hopper

DECODE_TOKENS = 16  # up to here, experts are visited one by one
GROUP_ROWS = 256  # of a work group

# Expert number(s) -> gate [..., F, D], up [..., F, D] and down [..., D, F], in the dtype of the activations.
Read = Callable[[Array], tuple[Array, ...]]


def unsupported(x_TD: Shaped, ids_TX: Shaped, experts: PackedExperts | HopperExperts) -> None:
    """Nothing is."""


def expert_ffn(
    x_TD: Float[Array, "T D"],
    ids_TX: Int[Array, "T X"],
    weights_TX: Float[Array, "T X"],
    experts: PackedExperts | HopperExperts,
    first: int,
    num_experts: int,
) -> Float[Array, "T D"]:
    """`api.expert_ffn` on rows `first` and following of the stacks."""
    return ffn_of(reader(experts, x_TD.dtype, first), num_experts, x_TD, ids_TX, weights_TX)


def ffn_of(
    read: Read,
    num_experts: int,
    x_TD: Float[Array, "T D"],
    ids_TX: Int[Array, "T X"],
    weights_TX: Float[Array, "T X"],
) -> Float[Array, "T D"]:
    """The op for experts that `read` gets from anywhere."""
    visit = active_experts if x_TD.shape[0] <= DECODE_TOKENS else grouped
    return visit(x_TD, ids_TX, weights_TX, read, num_experts)


def reader(experts: PackedExperts | HopperExperts, dtype, first: int = 0) -> Read:
    """Reads and expands single experts, or an array of them."""

    def read(expert: Array) -> tuple[Array, ...]:
        index = jnp.atleast_1d(expert) + first
        chosen = jax.tree.map(lambda stack: stack[index], experts)
        packed = from_hopper(chosen) if isinstance(chosen, HopperExperts) else chosen
        pairs = (packed.gate, packed.up, packed.down)
        matrices = [mxfp4.decode(mxfp4.unpack(codes), scales).astype(dtype) for codes, scales in pairs]
        return tuple(matrix if expert.ndim else matrix[0] for matrix in matrices)

    return read


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """In float32, but for the hidden activations, which are rounded to the dtype of `x`."""

    def matmul(a: Array, w: Array) -> Array:
        return jnp.einsum("...ti,...oi->...to", a, w, preferred_element_type=jnp.float32)

    hidden = (jax.nn.silu(matmul(x, gate)) * matmul(x, up)).astype(x.dtype)
    return matmul(hidden, down)


def coefficients(ids_TX: Array, weights_TX: Array, expert: Array | int) -> Array:
    """What each token multiplies an expert's output with."""
    return jnp.sum(jnp.where(ids_TX == expert, weights_TX, 0.0), axis=-1, keepdims=True)


def active_experts(x_TD: Array, ids_TX: Array, weights_TX: Array, read: Read, num_experts: int) -> Array:
    """A loop over the distinct experts of the block, each read and expanded once."""
    active = jnp.unique(ids_TX, size=min(num_experts, ids_TX.size), fill_value=num_experts)

    def visit(index: Array, y: Array) -> Array:
        expert = active[index]
        return y + coefficients(ids_TX, weights_TX, expert) * swiglu(x_TD, *read(expert))

    count = jnp.sum(active < num_experts)
    return jax.lax.fori_loop(0, count, visit, jnp.zeros(x_TD.shape, jnp.float32))


def grouped(x_TD: Array, ids_TX: Array, weights_TX: Array, read: Read, num_experts: int) -> Array:
    """Sorts (token, expert) pairs by expert into groups of one expert each, so that every product is a plain matmul."""
    tokens, chosen = ids_TX.shape
    pairs = tokens * chosen
    rows = min(GROUP_ROWS, -(-pairs // num_experts))
    groups = pairs // rows + num_experts  # enough for any imbalance
    expert_U, place_of_pair = assign_places(ids_TX.reshape(-1), num_experts, rows, groups)
    pair_of_place = jnp.full(groups * rows, pairs).at[place_of_pair].set(jnp.arange(pairs), unique_indices=True)

    x_PD = jnp.broadcast_to(x_TD[:, None], (tokens, chosen, x_TD.shape[-1])).reshape(pairs, -1)
    x_UcD = _permute(x_PD, pair_of_place, place_of_pair).reshape(groups, rows, -1)
    y_UcD = swiglu(x_UcD, *read(expert_U))
    y_PD = _permute(y_UcD.reshape(groups * rows, -1), place_of_pair, pair_of_place)
    return jnp.sum(y_PD.reshape(tokens, chosen, -1) * weights_TX[..., None], axis=1)


def assign_places(ids_P: Array, num_experts: int, columns: int, groups: int) -> tuple[Array, Array]:
    """The expert of each group, and for each pair its place among all groups' columns; past the last for no expert."""
    order_P = jnp.argsort(ids_P, stable=True)
    counts_E = jnp.bincount(ids_P, length=num_experts)
    groups_E = -(-counts_E // columns)
    first_group_E = jnp.cumsum(groups_E) - groups_E
    first_pair_E = jnp.cumsum(counts_E) - counts_E
    sorted_ids_P = ids_P[order_P]
    sorted_place_P = first_group_E[sorted_ids_P] * columns + jnp.arange(ids_P.size) - first_pair_E[sorted_ids_P]
    place_P = jnp.zeros_like(sorted_place_P).at[order_P].set(sorted_place_P, unique_indices=True)
    expert_U = jnp.searchsorted(jnp.cumsum(groups_E), jnp.arange(groups), side="right")
    nowhere_P = groups * columns + jnp.arange(ids_P.size)
    return jnp.minimum(expert_U, num_experts - 1), jnp.where(ids_P < num_experts, place_P, nowhere_P)


def max_groups(pairs: int, num_experts: int, columns: int) -> int:
    """Enough for any imbalance: full groups, and one that is not for each expert that has any pair."""
    return min(pairs, pairs // columns + num_experts)


def work_groups(ids_TX: Array, num_experts: int, columns: int) -> tuple[Int[Array, "U"], Int[Array, "U c"]]:
    """The expert of each group of so many columns, and the pair in each column (-1 for none)."""
    groups = max_groups(ids_TX.size, num_experts, columns)
    expert_U, place_P = assign_places(ids_TX.reshape(-1), num_experts, columns, groups)
    pairs = jnp.full(groups * columns, -1, jnp.int32)
    pairs = pairs.at[place_P].set(jnp.arange(ids_TX.size, dtype=jnp.int32), mode="drop", unique_indices=True)
    return expert_U.astype(jnp.int32), pairs.reshape(groups, columns)


@jax.custom_vjp
def _permute(rows: Array, index: Array, inverse: Array) -> Array:
    """rows[index], zero where out of range. The gradient is a gather by `inverse`: XLA's scatter-add is far slower."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _permute_forward(rows: Array, index: Array, inverse: Array):
    return _permute(rows, index, inverse), inverse


def _permute_backward(inverse: Array, gradient: Array):
    return jnp.take(gradient, inverse, axis=0, mode="fill", fill_value=0), None, None


_permute.defvjp(_permute_forward, _permute_backward)
