"""Prompt lookup: copies what followed the latest earlier occurrence of a text's longest known suffix."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mimo_jax.decode.drafter import Draft, DraftContext, ReadTokens, Weights


@dataclasses.dataclass(frozen=True)
class PromptLookupDrafter:
    """Deterministic, without parameters. Its cache is the text so far.

    Where fewer than `least` tokens match, nothing is proposed.
    """

    block_size: int = 8
    longest: int = 4
    least: int = 3
    aux_layers: tuple[int, ...] = ()
    expected: float | None = None

    def init_cache(self, batch: int, capacity: int) -> Int[Array, "B S"]:
        return jnp.zeros((batch, capacity + self.block_size), jnp.int32)

    def update_cache(self, weights: Weights, cache: Array, read: ReadTokens) -> Int[Array, "B S"]:
        step_T = jnp.arange(read.tokens_BT.shape[1])
        nowhere = cache.shape[1]
        column_BT = jnp.where(step_T < read.counts_B[:, None], read.lengths_B[:, None] + step_T, nowhere)
        return cache.at[jnp.arange(cache.shape[0])[:, None], column_BT].set(read.text_BT, mode="drop")

    def propose(self, context: DraftContext) -> Draft:
        rows_B = jnp.arange(context.cache.shape[0])
        text_BS = context.cache.at[rows_B, context.lengths_B].set(context.anchor_B)
        look_up = partial(continuation, longest=self.longest, count=self.block_size - 1)
        tokens_BM, matched_B = jax.vmap(look_up)(text_BS, context.lengths_B)
        return Draft(tokens_BM, None, jnp.where(matched_B >= self.least, tokens_BM.shape[1], 0))


def continuation(
    text_S: Int[Array, "S"], end: Int[Array, ""] | int, longest: int, count: int
) -> tuple[Int[Array, "M"], Int[Array, ""]]:
    """The `count` tokens predicted after `text_S[end]`, and how many tokens up to there were matched.

    The longest match wins, of at most `longest` tokens, and the latest of equal ones; without any (0), the token after
    the very first is copied. Entries below zero match nothing.
    """
    place_S = jnp.arange(text_S.shape[0])
    matched_S = _matched(text_S, end, longest)
    source = jnp.argmax(matched_S * text_S.shape[0] + place_S * (matched_S > 0))
    column_M = source + jnp.arange(1, count + 1)
    # A copy that reaches the end of the text goes on with what it has just copied.
    wrapped_M = source + 1 + (column_M - source - 1) % jnp.maximum(end - source, 1)
    return text_S[jnp.where(column_M > end, wrapped_M, column_M)], matched_S[source]


def _matched(text_S: Array, end: Array | int, longest: int) -> Int[Array, "S"]:
    """Per place, how many tokens up to it equal those up to the end, at most `longest`; 0 from the end on."""
    place_S = jnp.arange(text_S.shape[0])
    so_far_S: Bool[Array, "S"] = place_S < end
    total_S = jnp.zeros_like(text_S)
    for back in range(longest):
        same_S = jnp.roll(text_S, back) == text_S[jnp.maximum(end - back, 0)]
        so_far_S = so_far_S & same_S & (text_S >= 0) & (place_S >= back) & (end >= back)
        total_S += so_far_S
    return total_S
