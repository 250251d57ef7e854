"""The experts through Triton, for GPUs from Ampere to Blackwell: published layout, nothing but loads, shifts and dots.

Pairs of tokens and experts are sorted into work groups of one expert; a program takes one group and some rows of a
matrix, so a group's weights are read once however many tokens share them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import triton_call
from pallas_kernels.backends import Shaped
from pallas_kernels.expert_matmul.hopper_layout import HopperExperts, PackedExperts
from pallas_kernels.expert_matmul.reference import DECODE_TOKENS, work_groups

DECODE_COLUMNS, PREFILL_COLUMNS = 16, 32  # pairs of a work group; `dot` takes 16 at least
ROWS, COLS = 64, 128  # of a matrix, per step of a program


def unsupported(x_TD: Shaped, ids_TX: Shaped, experts: PackedExperts | HopperExperts) -> str | None:
    """What keeps this backend from serving a call."""
    if (reason := triton_call.missing()) is not None:
        return reason
    if isinstance(experts, HopperExperts):
        return "the experts are in the Hopper layout, not in the published one"
    if x_TD.dtype != jnp.bfloat16:
        return f"tokens of dtype {x_TD.dtype}, not bfloat16"
    _, hidden, features = experts.sizes
    if hidden % COLS or features % COLS:
        return f"experts of {hidden} x {features}; both must be multiples of {COLS}"
    return None


def expert_ffn(
    x_TD: Float[Array, "T D"],
    ids_TX: Int[Array, "T X"],
    weights_TX: Float[Array, "T X"],
    experts: PackedExperts,
    first: int,
    num_experts: int,
) -> Float[Array, "T D"]:
    """`api.expert_ffn` on rows `first` and following of the stacks."""
    from pallas_kernels.expert_matmul import triton_kernels

    tokens, chosen = ids_TX.shape
    _, hidden, features = experts.sizes
    columns = DECODE_COLUMNS if tokens <= DECODE_TOKENS else PREFILL_COLUMNS
    expert_U, pair_Uc = work_groups(ids_TX, num_experts, columns)
    call = functools.partial(triton_call.call, PAIRS=columns, ROWS=ROWS, COLS=COLS)
    tables = (expert_U + first, pair_Uc)
    hidden_PF = call(
        triton_kernels.gate_up,
        x_TD,
        *experts.gate,
        *experts.up,
        *tables,
        out=jax.ShapeDtypeStruct((ids_TX.size, features), x_TD.dtype),
        grid=(expert_U.size, features // ROWS),
        D=hidden,
        F=features,
        X=chosen,
    )
    y_PD = call(
        triton_kernels.down,
        hidden_PF,
        *experts.down,
        *tables,
        out=jax.ShapeDtypeStruct((ids_TX.size, hidden), jnp.float32),
        grid=(expert_U.size, hidden // ROWS),
        D=hidden,
        F=features,
    )
    return combine(y_PD, ids_TX < num_experts, weights_TX)


def combine(y_PD: Array, is_expert_TX: Array, weights_TX: Array) -> Array:
    """Sums the choices of each token; the rows of choices of no expert are undefined."""
    y_TXD = y_PD.reshape(*weights_TX.shape, y_PD.shape[1]) * weights_TX[..., None].astype(jnp.float32)
    return jnp.sum(jnp.where(is_expert_TX[..., None], y_TXD, 0), axis=1)
