"""What proposes blocks of tokens. A drafter is a small hashable object; its parameters and its cache are pytrees.

`NoDrafter` makes plain decoding the same loop as speculation, with blocks of one token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.cache import LayerCache, append, row_positions
from mimo_jax.config import SLIDING
from mimo_jax.drafter_config import LONGEST_MATCH, DrafterConfig
from mimo_jax.lookup import continuation
from mimo_jax.modeling.backbone import Features, Params
from mimo_jax.modeling.drafter import Drafter, Guesses
from mimo_jax.modeling.layers import linear
from mimo_jax.sampling import Strategy, draw_with_law
from mimo_jax.sharding import rows_of
from mimo_jax.verification import draft_keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """M proposed tokens per row, and the distributions they were drawn from (None: they were not drawn)."""

    tokens: Int[Array, "B M"]
    probabilities: Float[Array, "B M C"] | None


class Proposer(Protocol):
    """The drafter's side of the loop. `params` are its own, `target` the target's."""

    @property
    def block_size(self) -> int:
        """Tokens the target verifies per round: the anchor and the drafts."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose residual streams it reads."""
        ...

    @property
    def expected(self) -> float | None:
        """Tokens per round that were measured with the target it was made for, if that is known."""
        ...

    def init_cache(self, batch: int, capacity: int) -> Any:
        """What it remembers of the context, before there is any."""
        ...

    def absorb(
        self,
        params: Params,
        target: Params,
        cache: Any,
        tokens_BT: Int[Array, "B T"],
        features: Features,
        lengths_B: Int[Array, "B"],
        counts_B: Int[Array, "B"],
    ) -> Any:
        """The cache after the first `counts_B` of `tokens_BT`, which the target has just read behind `lengths_B`."""
        ...

    def propose(
        self,
        params: Params,
        target: Params,
        cache: Any,
        last_B: Int[Array, "B"],
        lengths_B: Int[Array, "B"],
        strategy: Strategy,
        keys_B: Array,
    ) -> Draft:
        """Drafts behind the anchor `last_B`, at position `lengths_B`."""
        ...


@dataclasses.dataclass(frozen=True)
class NoDrafter:
    """Plain autoregressive decoding."""

    block_size: int = 1
    taps: tuple[int, ...] = ()
    expected: float | None = None

    def init_cache(self, batch: int, capacity: int) -> tuple:
        return ()

    def absorb(self, params, target, cache, tokens_BT, features, lengths_B, counts_B) -> tuple:
        return ()

    def propose(self, params, target, cache, last_B, lengths_B, strategy, keys_B) -> Draft:
        return Draft(jnp.zeros((last_B.shape[0], 0), jnp.int32), None)


PLAIN = NoDrafter()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftCache:
    """A ring per draft layer, and the newest R tokens for prompt lookup, the last one at the end; -1: none yet."""

    layers: tuple[LayerCache, ...]
    text: Int[Array, "B R"]


@dataclasses.dataclass(frozen=True)
class BlockDrafter:
    """DFlash. Its cache has a fixed size: neither memory nor time per round grows with the context."""

    config: DrafterConfig

    @property
    def block_size(self) -> int:
        return self.config.block_size

    @property
    def taps(self) -> tuple[int, ...]:
        return self.config.target_layer_ids

    @property
    def expected(self) -> float | None:
        return self.config.acceptance_length

    def init_cache(self, batch: int, capacity: int) -> DraftCache:
        config = self.config
        shape = (batch, config.num_kv_heads, config.window + config.block_size, config.head_dim)

        def empty() -> Array:
            return jnp.zeros(shape, config.dtype)

        layers = tuple(LayerCache(empty(), empty()) for _ in range(config.num_layers))
        return DraftCache(layers, jnp.full((batch, config.lookup), -1, jnp.int32))

    def absorb(self, params, target, cache, tokens_BT, features, lengths_B, counts_B) -> DraftCache:
        positions_BT = lengths_B[:, None] + jnp.arange(tokens_BT.shape[1])
        new = Drafter(self.config).apply({"params": params}, features.taps, positions_BT, method="context")
        layers = tuple(
            append(held, keys, values, lengths_B, counts_B, SLIDING) for held, (keys, values) in zip(cache.layers, new)
        )
        text_BR = jnp.concatenate([cache.text, tokens_BT], axis=1)
        newest_BR = counts_B[:, None] + jnp.arange(self.config.lookup)
        return DraftCache(layers, jnp.take_along_axis(text_BR, newest_BR, axis=1))

    def propose(self, params, target, cache, last_B, lengths_B, strategy, keys_B) -> Draft:
        positions_BS = row_positions(SLIDING, cache.layers[0].keys.shape[2], lengths_B)
        module = Drafter(self.config)
        anchor_BD = rows_of(target["embed"], last_B)
        guesses = self._guesses(target, cache.text, last_B) if self.config.lookup else None
        hidden_BND = module.apply({"params": params}, anchor_BD, lengths_B, cache.layers, positions_BS, guesses)
        logits_BMC = linear(hidden_BND[:, 1:], target["head"], jnp.float32)

        def logits_of(slot: int, previous_B: Array, carry: None) -> tuple[Array, None]:
            logits_BC = logits_BMC[:, slot]
            if self.config.bias_rank:
                bias_BC = module.apply({"params": params}, previous_B, method="bias")
                logits_BC += jnp.pad(bias_BC, ((0, 0), (0, logits_BC.shape[1] - bias_BC.shape[1])))
            return only_known(logits_BC, self.config.vocab_size), carry

        return draft_in_turn(logits_of, None, last_B, self.block_size, strategy, keys_B)

    def _guesses(self, target: Params, text_BR: Array, last_B: Array) -> Guesses:
        text_BS = jnp.concatenate([text_BR, last_B[:, None]], axis=1)
        look_up = partial(continuation, end=self.config.lookup, longest=LONGEST_MATCH, count=self.block_size - 1)
        tokens_BM, matched_B = jax.vmap(look_up)(text_BS)
        return rows_of(target["embed"], tokens_BM), matched_B


def draft_in_turn(
    logits_of: Callable[[int, Array, Any], tuple[Array, Any]],
    carry: Any,
    last_B: Int[Array, "B"],
    block_size: int,
    strategy: Strategy,
    keys_B: Array,
) -> Draft:
    """Draws slot after slot from `logits_of(slot, token before it, carry)`, which returns logits and the next carry."""
    drafted, laws, token_B = [], [], last_B
    for slot in range(block_size - 1):
        logits_BC, carry = logits_of(slot, token_B, carry)
        token_B, law_BC = draw_with_law(strategy, logits_BC, draft_keys(keys_B, slot))
        drafted.append(token_B)
        if law_BC is not None:
            laws.append(law_BC)
    tokens_BM = jnp.stack(drafted, axis=1)
    return Draft(tokens_BM, jnp.stack(laws, axis=1) if laws else None)


def only_known(logits_BC: Float[Array, "B C"], known: int) -> Float[Array, "B C"]:
    """Logits of a drafter that proposes only ids below `known`: a cut would move the rows of a sharded vocabulary."""
    if known == logits_BC.shape[-1]:
        return logits_BC
    return jnp.where(jnp.arange(logits_BC.shape[-1]) < known, logits_BC, -jnp.inf)
