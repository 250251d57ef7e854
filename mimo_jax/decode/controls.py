"""What is asked of each row of a batch: how its tokens are drawn, where it ends, and what changes its logits before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from mimo_jax.decode.sampling import Strategy

NO_TOKEN = -1
STOPS = 24  # the arrays of stop ids are as wide as a multiple of it: each width is a program of its own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
    """What is added to logits before they become a distribution; penalties are those of the OpenAI API.

    A token that was generated c times loses c x frequency, and presence if c > 0.
    """

    bias_BC: Float[Any, "B C"]
    presence_B: Float[Any, "B"]
    frequency_B: Float[Any, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """What is None is switched off, in the program, too; numbers recompile nothing."""

    strategy: Strategy
    stops_BS: Int[Any, "B S"]  # ids that end a row; NO_TOKEN where it has fewer
    adjustments: Adjustments | None = None


def stops_of(rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "B S"]:
    """Stop ids of each row as one array, of a width that few rows change."""
    longest = -(-max(1, *map(len, rows)) // STOPS) * STOPS
    return np.array([[*ids, *[NO_TOKEN] * (longest - len(ids))] for ids in rows], np.int32)


def alike(strategy: Strategy, stop_ids: Sequence[int], batch: int) -> Controls:
    """Of rows that all draw by one strategy and end at the same ids."""
    return Controls(strategy, stops_of([stop_ids] * batch))


def adjusted(
    adjustments: Adjustments | None,
    logits_BNC: Float[Array, "B N C"],
    output_BS: Int[Array, "B S"],
    counts_B: Int[Array, "B"],
    drafts_BM: Int[Array, "B M"],
) -> Float[Array, "B N C"]:
    """The logits after each draft, when the first `counts_B` of `output_BS` were generated before the drafts.

    A draft counts for the places after it, as if it had been accepted, which it has where those are used.
    """
    if adjustments is None:
        return logits_BNC
    batch, _, vocabulary = logits_BNC.shape
    is_own_BS = jnp.arange(output_BS.shape[1]) < counts_B[:, None]
    column_BS = jnp.where(is_own_BS, output_BS, vocabulary)  # of no token
    made_BC = jnp.zeros((batch, vocabulary), jnp.int32)
    made_BC = made_BC.at[jnp.arange(batch)[:, None], column_BS].add(1, mode="drop")
    drafted_BMC = jnp.cumsum(jax.nn.one_hot(drafts_BM, vocabulary, dtype=jnp.int32), axis=1)
    made_BNC = made_BC[:, None] + jnp.pad(drafted_BMC, ((0, 0), (1, 0), (0, 0)))
    presence_B11, frequency_B11 = adjustments.presence_B[:, None, None], adjustments.frequency_B[:, None, None]
    penalty_BNC = frequency_B11 * made_BNC + jnp.where(made_BNC > 0, presence_B11, 0.0)
    return logits_BNC + adjustments.bias_BC[:, None] - penalty_BNC


def masked(masks_BNW: UInt32[Array, "B N W"] | None, logits_BNC: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
    """Tokens whose bit is not set become impossible. Token t is bit t % 32 of word t // 32."""
    if masks_BNW is None:
        return logits_BNC
    bits_BNC = jnp.repeat(masks_BNW, 32, axis=-1)[..., : logits_BNC.shape[-1]]
    token_C = jnp.arange(logits_BNC.shape[-1], dtype=jnp.uint32)
    return jnp.where((bits_BNC >> (token_C % 32)) & 1 > 0, logits_BNC, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the model's own distribution, before anything changed it: of every generated token, and of
    the `K` most likely ones in its place.
    """

    own_BS: Float[Array, "B S"]
    top_BSK: Float[Array, "B S K"]
    top_ids_BSK: Int[Array, "B S K"]


def empty_logprobs(batch: int, capacity: int, most: int) -> Logprobs:
    shape = (batch, capacity)
    return Logprobs(jnp.zeros(shape), jnp.zeros((*shape, most)), jnp.zeros((*shape, most), jnp.int32))


def recorded(
    logprobs: Logprobs | None, logits_BNC: Float[Array, "B N C"], tokens_BN: Int[Array, "B N"], column_BN: Array
) -> Logprobs | None:
    """`logprobs` with those of new tokens, written where `column_BN` says; beyond the capacity is nowhere."""
    if logprobs is None:
        return None
    logs_BNC = jax.nn.log_softmax(logits_BNC.astype(jnp.float32))
    own_BN = jnp.take_along_axis(logs_BNC, tokens_BN[..., None], axis=-1)[..., 0]
    top_BNK, top_ids_BNK = jax.lax.top_k(logs_BNC, logprobs.top_BSK.shape[-1])
    place = (jnp.arange(tokens_BN.shape[0])[:, None], column_BN)

    def put(held: Array, new: Array) -> Array:
        return held.at[place].set(new, mode="drop")

    return Logprobs(
        put(logprobs.own_BS, own_BN), put(logprobs.top_BSK, top_BNK), put(logprobs.top_ids_BSK, top_ids_BNK)
    )
