"""GPTQ (arXiv 2210.17323) onto MXFP4: rounding that knows which inputs a weight will meet.

A matrix is rounded column by column. What a column misses is made up for by those after it, as far as their inputs go
together, which the inverse of the inputs' second moments says. A block has the scale with which it loses least.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mimo_jax.weights import MxTensor
from pallas_kernels import mxfp4

# Exponents tried for a block, beside rule `even`'s; of equals the first. Half its scale clips the largest weights and
# halves the steps between all others.
SCALE_SHIFTS = (0, -1)
# Of the mean second moment, added to each: inputs never seen, or never apart, would otherwise be free to go anywhere.
DAMPING = 0.01
# As if an expert had seen so many tokens whose inputs are independent of each other. Where it saw none, that is all
# that is known of them, and no column makes up for another.
PRIOR_TOKENS = 32

_ELEMENTS = mxfp4.decode(np.arange(mxfp4.BLOCK, dtype=np.uint8) % 16, np.array([127], np.uint8))[:16]
_SCALES = mxfp4.decode(np.full((255, mxfp4.BLOCK), 2, np.uint8), np.arange(255, dtype=np.uint8)[:, None])[:, 0]


def damped(moments_II: Float[Array, "I I"], tokens: Int[Array, ""] | int) -> Float[Array, "I I"]:
    """Second moments, summed over `tokens` inputs, that can be inverted whatever the inputs were."""
    mean = jnp.trace(moments_II) / len(moments_II)
    share = DAMPING + PRIOR_TOKENS / jnp.maximum(tokens, 1)
    return moments_II + jnp.where(mean > 0, share * mean, 1.0) * jnp.eye(len(moments_II))


@partial(jax.jit, static_argnames="shifts")
def round_calibrated(
    weights_OI: Float[Array, "O I"], moments_II: Float[Array, "I I"], shifts: tuple[int, ...] = SCALE_SHIFTS
) -> MxTensor:
    """MXFP4 weights Q with a small trace((W - Q) M (W - Q)^T), the squared error of the outputs of inputs with the
    positive definite second moments M.
    """
    rows, columns = weights_OI.shape
    spread_II = _spread(moments_II)

    def visit(block: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        left_OI, codes_OI, scales_OK = state
        first = block * mxfp4.BLOCK
        left_Ob = jax.lax.dynamic_slice(left_OI, (0, first), (rows, mxfp4.BLOCK))
        spread_bI = jax.lax.dynamic_slice(spread_II, (first, 0), (mxfp4.BLOCK, columns))
        within_bb = jax.lax.dynamic_slice(spread_bI, (0, first), (mxfp4.BLOCK, mxfp4.BLOCK))
        codes_Ob, scales_O, errors_Ob = _round_block(left_Ob, within_bb, shifts)
        return (
            left_OI - errors_Ob @ spread_bI,  # nothing changes before the block, where `spread` is zero
            jax.lax.dynamic_update_slice(codes_OI, codes_Ob, (0, first)),
            jax.lax.dynamic_update_slice(scales_OK, scales_O[:, None], (0, block)),
        )

    blocks = columns // mxfp4.BLOCK
    state = weights_OI, jnp.zeros((rows, columns), jnp.uint8), jnp.zeros((rows, blocks), jnp.uint8)
    _, codes_OI, scales_OK = jax.lax.fori_loop(0, blocks, visit, state)
    return MxTensor(mxfp4.pack(codes_OI), scales_OK)


def _spread(moments_II: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """The upper triangular U with U^T U = M^-1: its row j says how column j's error goes to those after it."""
    # Cholesky from the last column to the first, then one triangular solve: M itself is never inverted.
    lower = jnp.linalg.cholesky(moments_II[::-1, ::-1])
    return jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(lower)), lower=True)[::-1, ::-1]


def _round_block(
    weights_Ob: Float[Array, "O b"], within_bb: Float[Array, "b b"], shifts: tuple[int, ...]
) -> tuple[UInt8[Array, "O b"], UInt8[Array, "O"], Float[Array, "O b"]]:
    """Codes, scale bytes, and the error of each column in units of U's diagonal."""
    even_O = mxfp4.scale_bytes(jnp.max(jnp.abs(weights_Ob), axis=-1), "even").astype(jnp.int32)

    def attempt(shift: Array) -> tuple[Array, Array, Array]:
        scale_O = jnp.clip(even_O + shift, 0, len(_SCALES) - 1)

        def visit(column: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            left_Ob, codes_Ob, errors_Ob = state
            codes_O = mxfp4.encode_elements(left_Ob[:, column] * jnp.asarray(1 / _SCALES)[scale_O])
            rounded_O = jnp.asarray(_ELEMENTS)[codes_O] * jnp.asarray(_SCALES)[scale_O]
            error_O = (left_Ob[:, column] - rounded_O) / within_bb[column, column]
            return (
                left_Ob - error_O[:, None] * within_bb[column],
                codes_Ob.at[:, column].set(codes_O),
                errors_Ob.at[:, column].set(error_O),
            )

        start = weights_Ob, jnp.zeros(weights_Ob.shape, jnp.uint8), jnp.zeros_like(weights_Ob)
        _, codes_Ob, errors_Ob = jax.lax.fori_loop(0, mxfp4.BLOCK, visit, start)
        return codes_Ob, scale_O.astype(jnp.uint8), errors_Ob

    codes_SOb, scales_SO, errors_SOb = jax.vmap(attempt)(jnp.array(shifts))
    best_O, row = jnp.argmin(jnp.sum(errors_SOb**2, axis=-1), axis=0), jnp.arange(len(weights_Ob))
    return codes_SOb[best_O, row], scales_SO[best_O, row], errors_SOb[best_O, row]
