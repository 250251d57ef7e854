"""Prompt lookup: what followed the latest earlier occurrence of a text's longest known suffix."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def continuation(
    text_S: Int[Array, "S"], end: Int[Array, ""] | int, longest: int, count: int
) -> tuple[Int[Array, "M"], Int[Array, ""]]:
    """The `count` tokens foretold behind `text_S[end]`, and how many tokens up to there were matched.

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
