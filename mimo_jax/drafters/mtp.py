"""The target's own multi-token-prediction layer as a drafter: one token per pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mimo_jax.config.model import SLIDING, ModelConfig
from mimo_jax.decode.drafter import Draft, DraftContext, ReadTokens, Weights, draft_sequentially
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.cache import LayerCache, init_layer
from mimo_jax.modeling.linear import linear
from mimo_jax.weights import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MtpCache:
    """Rows of the MTP layer, and the target's newest hidden state, whose row waits for the token after it."""

    layer: LayerCache
    hidden: Float[Array, "B D"]


@dataclasses.dataclass(frozen=True)
class MtpDrafter:
    """The first MTP layer, fed with the target's hidden state, then with its own. `confidence` ends a block early, see
    `decode.drafter.confident`.
    """

    config: ModelConfig
    confidence: float = dataclasses.field(default=0.0, kw_only=True)
    block_size: int = 8
    aux_layers: tuple[int, ...] = ()
    expected: float | None = None

    def init_cache(self, batch: int, capacity: int) -> MtpCache:
        hidden_BD = jnp.zeros((batch, self.config.hidden_size), self.config.dtype)
        return MtpCache(init_layer(self.config, SLIDING, batch, capacity), hidden_BD)

    def update_cache(self, weights: Weights, cache: MtpCache, read: ReadTokens) -> MtpCache:
        hidden_BTD, counts_B = read.features.hidden, read.counts_B
        # The row of the first prompt token would be at position -1, where nothing is ever visible.
        before_BTD = jnp.concatenate([cache.hidden[:, None], hidden_BTD[:, :-1]], axis=1)
        _, layer = self._mtp_step(weights.target, before_BTD, read.tokens_BT, cache.layer, read.lengths_B - 1, counts_B)
        newest_BD = jnp.take_along_axis(hidden_BTD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)[:, 0]
        return MtpCache(layer, jnp.where(counts_B[:, None] > 0, newest_BD, cache.hidden))

    def propose(self, context: DraftContext) -> Draft:
        target, one_B = context.weights.target, jnp.ones_like(context.anchor_B)

        def logits_of(position: int, token_B: Array, carry: MtpCache) -> tuple[Array, MtpCache]:
            before_B = context.lengths_B - 1 + position
            hidden_B1D, layer = self._mtp_step(
                target, carry.hidden[:, None], token_B[:, None], carry.layer, before_B, one_B
            )
            hidden_BD = hidden_B1D[:, 0]
            return linear(hidden_BD, target["head"], jnp.float32), MtpCache(layer, hidden_BD)

        return draft_sequentially(logits_of, context.cache, context, self.block_size, self.confidence)

    def _mtp_step(self, target: Params, *arguments) -> tuple[Array, LayerCache]:
        return Backbone(self.config).apply({"params": target}, *arguments, method="mtp_step")
