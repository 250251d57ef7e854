"""DFlash: a block of drafts in one forward pass of `modeling.dflash`.

Its cache has a fixed size: neither memory nor time per round grows with the context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.config.drafter import LONGEST_MATCH, DrafterConfig
from mimo_jax.config.model import SLIDING
from mimo_jax.decode.drafter import Draft, DraftContext, ReadTokens, Weights, draft_sequentially, mask_unknown
from mimo_jax.drafters.prompt_lookup import continuation
from mimo_jax.modeling.cache import LayerCache, append, row_positions
from mimo_jax.modeling.dflash import DFlash, Guesses
from mimo_jax.modeling.linear import linear
from mimo_jax.sharding import embedding_lookup
from mimo_jax.weights import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftCache:
    """A ring per draft layer, and the newest S tokens for prompt lookup, the last one at the end; -1: none yet."""

    layers: tuple[Any, ...]  # `LayerCache`s; beside a fused step the stacks of all layers' keys and of their values
    text: Int[Array, "B S"]


@dataclasses.dataclass(frozen=True)
class DFlashDrafter:
    """The published drafter, see `modeling.dflash`. `confidence` ends a block early, see `decode.drafter.confident`."""

    config: DrafterConfig
    confidence: float = dataclasses.field(default=0.0, kw_only=True)

    @property
    def block_size(self) -> int:
        return self.config.block_size

    @property
    def aux_layers(self) -> tuple[int, ...]:
        return self.config.target_layer_ids

    @property
    def expected(self) -> float | None:
        return self.config.acceptance_length

    def init_cache(self, batch: int, capacity: int) -> DraftCache:
        return DraftCache(self.empty_rings(batch), jnp.full((batch, self.config.lookup), -1, jnp.int32))

    def update_cache(self, weights: Weights, cache: DraftCache, read: ReadTokens) -> DraftCache:
        text_BS = jnp.concatenate([cache.text, read.text_BT], axis=1)
        newest_BS = read.counts_B[:, None] + jnp.arange(self.config.lookup)
        layers = self.updated_rings(weights, cache.layers, read)
        return DraftCache(layers, jnp.take_along_axis(text_BS, newest_BS, axis=1))

    def empty_rings(self, batch: int) -> tuple[Any, ...]:
        """`DraftCache.layers` before there is any context."""
        config = self.config
        shape = (batch, config.num_kv_heads, config.window + config.block_size, config.head_dim)

        def empty() -> Array:
            return jnp.zeros(shape, config.dtype)

        return tuple(LayerCache(empty(), empty()) for _ in range(config.num_layers))

    def updated_rings(self, weights: Weights, layers: tuple[Any, ...], read: ReadTokens) -> tuple[Any, ...]:
        """`DraftCache.layers` after what the target has read."""
        lengths_B, counts_B = read.lengths_B, read.counts_B
        positions_BT = lengths_B[:, None] + jnp.arange(read.tokens_BT.shape[1])
        module, params = DFlash(self.config), {"params": weights.drafter}
        new = module.apply(params, read.features.aux, positions_BT, method="context")
        return tuple(
            append(held, keys, values, lengths_B, counts_B, SLIDING) for held, (keys, values) in zip(layers, new)
        )

    def propose(self, context: DraftContext) -> Draft:
        cache, target, module = context.cache, context.weights.target, DFlash(self.config)
        apply = partial(module.apply, {"params": context.weights.drafter})
        positions_BS = row_positions(SLIDING, cache.layers[0].keys.shape[2], context.lengths_B)
        anchor_BD = embedding_lookup(target["embed"], context.anchor_B)
        guesses = self._guesses(target, cache.text, context.anchor_B) if self.config.lookup else None
        hidden_BND = apply(anchor_BD, context.lengths_B, cache.layers, positions_BS, guesses)
        logits_BMC = linear(hidden_BND[:, 1:], target["head"], jnp.float32)
        return self.draw(context, logits_BMC, partial(apply, method="bias"))

    def draw(
        self, context: DraftContext, logits_BMC: Float[Array, "B M C"], bias_of: Callable[[Array], Array]
    ) -> Draft:
        """Draft after draft, from their logits and what `bias_of` the token before adds."""

        def logits_of(position: int, previous_B: Array, carry: None) -> tuple[Array, None]:
            logits_BC = logits_BMC[:, position]
            if self.config.bias_rank:
                bias_BC = bias_of(previous_B)
                logits_BC += jnp.pad(bias_BC, ((0, 0), (0, logits_BC.shape[1] - bias_BC.shape[1])))
            return mask_unknown(logits_BC, self.config.vocab_size), carry

        return draft_sequentially(logits_of, None, context, self.block_size, self.confidence)

    def _guesses(self, target: Params, text_BS: Array, anchor_B: Array) -> Guesses:
        text_BS = jnp.concatenate([text_BS, anchor_B[:, None]], axis=1)
        look_up = partial(continuation, end=self.config.lookup, longest=LONGEST_MATCH, count=self.block_size - 1)
        tokens_BM, matched_B = jax.vmap(look_up)(text_BS)
        return embedding_lookup(target["embed"], tokens_BM), matched_B
