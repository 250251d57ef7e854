"""Drafters that DFlash is compared with, in the same loop."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.cache import LayerCache, init_layer, row_positions
from mimo_jax.config import SLIDING, ModelConfig
from mimo_jax.drafting import BlockDrafter, Draft, draft_in_turn, only_known
from mimo_jax.lookup import continuation
from mimo_jax.modeling.attention import heads_first
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.drafter import Drafter
from mimo_jax.modeling.layers import linear
from mimo_jax.sharding import rows_of


@dataclasses.dataclass(frozen=True)
class NgramDrafter:
    """Prompt lookup: copies what followed the latest earlier occurrence of the longest known suffix.

    Deterministic, without parameters. Its cache is the text so far.
    """

    block_size: int = 8
    longest: int = 4
    taps: tuple[int, ...] = ()
    expected: float | None = None

    def init_cache(self, batch: int, capacity: int) -> Int[Array, "B S"]:
        return jnp.zeros((batch, capacity + self.block_size), jnp.int32)

    def absorb(self, params, target, cache, tokens_BT, features, lengths_B, counts_B) -> Int[Array, "B S"]:
        slot_T = jnp.arange(tokens_BT.shape[1])
        column_BT = jnp.where(slot_T < counts_B[:, None], lengths_B[:, None] + slot_T, cache.shape[1])
        return cache.at[jnp.arange(cache.shape[0])[:, None], column_BT].set(tokens_BT, mode="drop")

    def propose(self, params, target, cache, last_B, lengths_B, strategy, keys_B) -> Draft:
        text_BS = cache.at[jnp.arange(cache.shape[0]), lengths_B].set(last_B)
        look_up = partial(continuation, longest=self.longest, count=self.block_size - 1)
        return Draft(jax.vmap(look_up)(text_BS, lengths_B)[0], None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MtpCache:
    """Rows of the MTP layer, and the target's newest hidden state, whose row waits for the token after it."""

    layer: LayerCache
    hidden: Float[Array, "B D"]


@dataclasses.dataclass(frozen=True)
class MtpDrafter:
    """The target's own first MTP layer, one token per pass, fed with its own hidden state behind the first."""

    config: ModelConfig
    block_size: int = 8
    taps: tuple[int, ...] = ()
    expected: float | None = None

    def init_cache(self, batch: int, capacity: int) -> MtpCache:
        hidden_BD = jnp.zeros((batch, self.config.hidden_size), self.config.dtype)
        return MtpCache(init_layer(self.config, SLIDING, batch, capacity), hidden_BD)

    def absorb(self, params, target, cache, tokens_BT, features, lengths_B, counts_B) -> MtpCache:
        # The row of the first prompt token would be at position -1, where nothing is ever visible.
        before_BTD = jnp.concatenate([cache.hidden[:, None], features.hidden[:, :-1]], axis=1)
        _, layer = self._look_ahead(target, before_BTD, tokens_BT, cache.layer, lengths_B - 1, counts_B)
        newest_BD = jnp.take_along_axis(features.hidden, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)[:, 0]
        return MtpCache(layer, jnp.where(counts_B[:, None] > 0, newest_BD, cache.hidden))

    def propose(self, params, target, cache, last_B, lengths_B, strategy, keys_B) -> Draft:
        def logits_of(slot: int, token_B: Array, carry: MtpCache) -> tuple[Array, MtpCache]:
            hidden_B1D, layer = self._look_ahead(
                target,
                carry.hidden[:, None],
                token_B[:, None],
                carry.layer,
                lengths_B - 1 + slot,
                jnp.ones_like(token_B),
            )
            hidden_BD = hidden_B1D[:, 0]
            return linear(hidden_BD, target["head"], jnp.float32), MtpCache(layer, hidden_BD)

        return draft_in_turn(logits_of, cache, last_B, self.block_size, strategy, keys_B)

    def _look_ahead(self, target, *arguments) -> tuple[Array, LayerCache]:
        return Backbone(self.config).apply({"params": target}, *arguments, method="look_ahead")


@dataclasses.dataclass(frozen=True)
class ChainDrafter(BlockDrafter):
    """The same modules, geometry and injected context, drafting token by token: one forward pass per slot.

    Row k embeds the token drafted before it and predicts the next one, so its parameters are trained as such.
    """

    def propose(self, params, target, cache, last_B, lengths_B, strategy, keys_B) -> Draft:
        apply = Drafter(self.config).apply

        def logits_of(slot: int, token_B: Array, carry) -> tuple[Array, tuple]:
            held, positions_BS = carry
            row_B = lengths_B + slot
            x_B1D = rows_of(target["embed"], token_B)[:, None]
            hidden_B1D, offered = apply({"params": params}, x_B1D, row_B, held, positions_BS, method="read")
            logits_BC = only_known(linear(hidden_B1D[:, 0], target["head"], jnp.float32), self.config.vocab_size)
            positions_BS = jnp.concatenate([positions_BS, row_B[:, None]], axis=1)
            return logits_BC, (tuple(map(_with_row, held, offered)), positions_BS)

        carry = cache.layers, row_positions(SLIDING, cache.layers[0].keys.shape[2], lengths_B)
        return draft_in_turn(logits_of, carry, last_B, self.block_size, strategy, keys_B)


def _with_row(held: LayerCache, offered: tuple[Array, Array]) -> LayerCache:
    """The cache with the row just read behind its other rows."""
    keys, values = map(heads_first, offered)
    return LayerCache(jnp.concatenate([held.keys, keys], axis=2), jnp.concatenate([held.values, values], axis=2))
