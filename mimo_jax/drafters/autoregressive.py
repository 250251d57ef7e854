"""DFlash's control: the same modules, geometry and injected context, drafting token by token."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array

from mimo_jax.config.model import SLIDING
from mimo_jax.decode.drafter import Draft, DraftContext, draft_sequentially, mask_unknown
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.modeling.attention import heads_first
from mimo_jax.modeling.cache import LayerCache, row_positions
from mimo_jax.modeling.dflash import DFlash
from mimo_jax.modeling.linear import linear
from mimo_jax.sharding import embedding_lookup


@dataclasses.dataclass(frozen=True)
class AutoregressiveDrafter(DFlashDrafter):
    """One forward pass per draft. Row k embeds the token drafted before it and predicts the next one, so its parameters
    are trained as such (`train.py drafter --kind chain`).
    """

    def propose(self, context: DraftContext) -> Draft:
        target, cache = context.weights.target, context.cache
        read = partial(DFlash(self.config).apply, {"params": context.weights.drafter}, method="read")

        def logits_of(position: int, token_B: Array, carry) -> tuple[Array, tuple]:
            held, positions_BS = carry
            row_B = context.lengths_B + position
            x_B1D = embedding_lookup(target["embed"], token_B)[:, None]
            hidden_B1D, offered = read(x_B1D, row_B, held, positions_BS)
            logits_BC = linear(hidden_B1D[:, 0], target["head"], jnp.float32)
            positions_BS = jnp.concatenate([positions_BS, row_B[:, None]], axis=1)
            carry = tuple(map(_with_row, held, offered)), positions_BS
            return mask_unknown(logits_BC, self.config.vocab_size), carry

        carry = cache.layers, row_positions(SLIDING, cache.layers[0].keys.shape[2], context.lengths_B)
        return draft_sequentially(logits_of, carry, context, self.block_size, self.confidence)


def _with_row(held: LayerCache, offered: tuple[Array, Array]) -> LayerCache:
    """The cache with the row just read after its other rows."""
    keys, values = map(heads_first, offered)
    return LayerCache(jnp.concatenate([held.keys, keys], axis=2), jnp.concatenate([held.values, values], axis=2))
