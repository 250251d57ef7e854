"""The reference of `mosaic_tile` in plain JAX, for the interpreter: it has neither inline code nor warp-level products.

It decodes with the same rotations and masks, so that both stand or fall by the layout.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import mxfp4
from pallas_kernels.expert_matmul import hopper_layout, mosaic_tile
from pallas_kernels.expert_matmul.hopper_layout import STEP, Tiling


def multiply_stage(tiling: Tiling, tokens: int, refs: Sequence[Any], scalars: mosaic_tile.Scalars) -> None:
    """`mosaic_tile.multiply_stage`, by the same rotations and masks."""
    words, activations, _, pairs, out = refs
    found = _plain_product(words[...], activations[:, pl.ds(0, tiling.panel_cols)], tiling)
    first = (scalars["stage"] * tiling.stage_items + scalars["start"]) * hopper_layout.ROWS
    own_pairs = pairs[pl.ds(scalars["group"] * tokens, tokens)]

    def store(token: jax.Array, _: None) -> None:
        pair = own_pairs[token]
        # Each count has a store of its own: the race detector compares a store with all that were before.
        for count in range(1, 1 + tiling.stage_items):

            @pl.when((pair >= 0) & (scalars["count"] == count))
            def store_items(size=count) -> None:
                rows = pl.ds(first, size * hopper_layout.ROWS)
                out[pair, scalars["k_split"], rows] = found[token, :size].reshape(-1)

    jax.lax.fori_loop(0, tokens, store, None)


@functools.partial(jax.jit, static_argnums=2)
def _plain_product(words: jax.Array, activations: jax.Array, tiling: Tiling) -> jax.Array:
    """[tokens, items, 16]."""
    weights = decode_tiles(words.reshape(tiling.stage_tiles, tiling.tile_words), tiling.span)
    weights = weights.reshape(tiling.stage_items, tiling.item_tiles, hopper_layout.ROWS, tiling.span)
    weights = jnp.swapaxes(weights, 1, 2).reshape(tiling.stage_items, hopper_layout.ROWS, tiling.panel_cols)
    return jnp.einsum("crk,nk->ncr", weights, activations, preferred_element_type=jnp.float32)


def decode_tiles(tiles: jax.Array, span: int) -> jax.Array:
    """int32 [warps, tile words] -> bf16 [warps, 16, span]: what the inline code computes, value by value."""
    warps = tiles.shape[0]
    words = tiles[:, : 2 * span].astype(jnp.uint32).reshape(warps, span // 64, 8, 4, 2, 2)
    registers = []
    for register, rotation in enumerate(hopper_layout.ROTATIONS):
        bits = _rotate(words, rotation) & np.uint32(mosaic_tile.CODE_BITS)
        if register == 3:
            mantissas = _rotate(words, hopper_layout.LAST_MANTISSA) & np.uint32(mosaic_tile.LAST_BITS[1])
            bits = bits & np.uint32(mosaic_tile.LAST_BITS[0]) | mantissas
        halves = [bits >> 16 * half & 0xFFFF for half in range(2)]
        registers.append(jnp.stack([half >> 6 & 7 | half >> 12 & 8 for half in halves], axis=-1))
    # warp, 64, row, thread, block, step, (column pair, row half), column -> warp, row half, row, columns
    codes = jnp.stack(registers, axis=-2).reshape(warps, span // 64, 8, 4, 2, 2, 2, 2, 2)
    codes = jnp.transpose(codes, (0, 7, 2, 1, 4, 3, 5, 6, 8)).reshape(warps, hopper_layout.ROWS, span)
    stored = tiles[:, 2 * span :].astype(jnp.uint32).reshape(warps, span // STEP, 8, 2)
    stored = jnp.stack([stored >> 8 * byte & 255 for byte in range(4)], axis=-1)
    stored = stored.reshape(warps, span // STEP, 8, 2, 2, 2)  # warp, 128, row, 64, block, row half
    stored = jnp.transpose(stored, (0, 5, 2, 1, 3, 4)).reshape(warps, hopper_layout.ROWS, span // mxfp4.BLOCK)
    scales = (stored - hopper_layout.SCALE_OFFSET & 255).astype(jnp.uint8)
    return mxfp4.decode(codes.astype(jnp.uint8), scales).astype(jnp.bfloat16)


def _rotate(words: jax.Array, by: int) -> jax.Array:
    return words if by == 0 else words << by | words >> 32 - by
