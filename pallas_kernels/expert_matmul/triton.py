"""The experts through Triton, for GPUs from Ampere to Blackwell: published layout, nothing but loads, shifts and dots.

Pairs of tokens and experts are sorted into blocks of one expert; a program takes one block and some rows of a matrix,
so a block's weights are read once however many tokens share them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import triton_call
from pallas_kernels.expert_matmul.layout import PackedExperts, TiledExperts
from pallas_kernels.expert_matmul.reference import DECODE_TOKENS, blocks_of

DECODE_COLUMNS, PREFILL_COLUMNS = 16, 32  # pairs of a block; `dot` takes 16 at least
ROWS, COLS = 64, 128  # of a matrix, per step of a program


def unsupported(x_TD: Array, ids_TX: Array, experts: PackedExperts | TiledExperts) -> str | None:
    """What keeps this backend from serving a call."""
    if (reason := triton_call.missing()) is not None:
        return reason
    if isinstance(experts, TiledExperts):
        return "the experts are in the Hopper kernel's tiles, not in the published layout"
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
    expert_B, pair_S = blocks_of(ids_TX, num_experts, columns)
    blocks = expert_B.size
    call = functools.partial(triton_call.call, N=columns, ROWS=ROWS, COLS=COLS)
    tables = (expert_B + first, pair_S)
    hidden_PF = call(
        triton_kernels.gate_up,
        x_TD,
        *experts.gate,
        *experts.up,
        *tables,
        out=jax.ShapeDtypeStruct((ids_TX.size, features), x_TD.dtype),
        grid=(blocks, features // ROWS),
        K=hidden,
        F=features,
        X=chosen,
    )
    y_PD = call(
        triton_kernels.down,
        hidden_PF,
        *experts.down,
        *tables,
        out=jax.ShapeDtypeStruct((ids_TX.size, hidden), jnp.float32),
        grid=(blocks, hidden // ROWS),
        K=features,
        D=hidden,
    )
    return combine(y_PD, ids_TX < num_experts, weights_TX)


def combine(y_PD: Array, is_expert_TX: Array, weights_TX: Array) -> Array:
    """Sums the choices of each token; the rows of choices of no expert are undefined."""
    y_TXD = y_PD.reshape(*weights_TX.shape, y_PD.shape[1]) * weights_TX[..., None].astype(jnp.float32)
    return jnp.sum(jnp.where(is_expert_TX[..., None], y_TXD, 0), axis=1)
