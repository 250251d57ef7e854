"""Decoding on device: prefill in bucketed chunks, then one jitted while_loop over a donated state.

A *step* is `(params, tokens, cache, counts, logits) -> (logits, features, cache)`. The loop knows nothing else of the
model. Streaming is the same loop with a small budget of rounds per visit of the host.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mimo_jax.cache import MAX_BLOCK, Cache, init_cache
from mimo_jax.config import ModelConfig
from mimo_jax.modeling.backbone import Backbone, Features, Params
from mimo_jax.sampling import Strategy, draw

PREFILL_BUCKETS = (16, 64, 256)
CAPACITY_BUCKETS = tuple(2**power for power in range(8, 21))


@dataclasses.dataclass(frozen=True)
class FlaxStep:
    """The modules under XLA as a step. Hashable, so that equal configs share compiled programs."""

    config: ModelConfig

    def __call__(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        cache: Cache,
        counts_B: Int[Array, "B"],
        logits: Literal["all", "last"] = "all",
    ) -> tuple[Float[Array, "B T C"], Features, Cache]:
        return Backbone(self.config).apply({"params": params}, tokens_BT, cache, counts_B, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries. `last` is committed but not yet in the cache; `output` holds the generated tokens."""

    cache: Cache
    last: Int[Array, "B"]
    output: Int[Array, "B S"]
    counts: Int[Array, "B"]
    limits: Int[Array, "B"]
    is_done: Bool[Array, "B"]
    keys: Array


def capacity_for(tokens: int) -> int:
    """Cache rows for `tokens` tokens: the smallest bucket that also holds one block beyond them."""
    return next((size for size in CAPACITY_BUCKETS if size >= tokens + MAX_BLOCK), tokens + MAX_BLOCK)


def prefill_chunks(length: int) -> list[tuple[int, int]]:
    """(start, size) of the chunks that cover `length` tokens; every size is a bucket, the last chunk is padded."""
    chunks, start = [], 0
    while start < length:
        rest = min(length - start, PREFILL_BUCKETS[-1])
        chunks.append((start, next(size for size in PREFILL_BUCKETS if size >= rest)))
        start += chunks[-1][1]
    return chunks


@partial(jax.jit, static_argnames="step", donate_argnames=("cache", "logits_BC"))
def _prefill_chunk(step, params, tokens_BT, counts_B, cache, logits_BC):
    """Runs one chunk; rows that end in it get their next-token logits."""
    new_B1C, _, cache = step(params, tokens_BT, cache, counts_B, "last")
    return cache, jnp.where((counts_B > 0)[:, None], new_B1C[:, 0], logits_BC)


def prefill(
    step: FlaxStep, params: Params, prompts: list[list[int]], capacity: int
) -> tuple[Cache, Float[Array, "B C"]]:
    """Fills a fresh cache with the prompts (token ids, none empty); the logits follow each prompt's last token."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    cache = init_cache(step.config, len(prompts), capacity)
    logits_BC = jnp.zeros((len(prompts), step.config.vocab_size), jnp.float32)
    for start, size in prefill_chunks(int(lengths.max())):
        tokens = np.zeros((len(prompts), size), np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + size]
            tokens[row, : len(piece)] = piece
        counts = np.clip(lengths - start, 0, size).astype(np.int32)
        cache, logits_BC = _prefill_chunk(step, params, tokens, counts, cache, logits_BC)
    return cache, logits_BC


@partial(jax.jit, donate_argnames="cache")
def start(
    cache: Cache,
    logits_BC: Float[Array, "B C"],
    limits_B: Int[Array, "B"],
    keys_B: Array,
    stops: Int[Array, "n"],
    strategy: Strategy,
) -> State:
    """The state after the first token, drawn from the prefill's logits."""
    batch, capacity = limits_B.shape[0], max(layer.keys.shape[2] for layer in cache.layers)
    zeros = jnp.zeros(batch, jnp.int32)
    output = jnp.zeros((batch, capacity), jnp.int32)
    state = State(cache, zeros, output, zeros, limits_B, limits_B <= 0, keys_B)
    return _commit(state, logits_BC, stops, strategy)


def _commit(state: State, logits_BC: Array, stops: Array, strategy: Strategy) -> State:
    """Draws one token for every unfinished row. Its randomness depends on the row's key and position only."""
    keys_B = jax.vmap(jax.random.fold_in)(state.keys, state.counts)
    token_B = draw(strategy, logits_BC, keys_B)
    rows = jnp.arange(token_B.shape[0])
    column = jnp.where(state.is_done, state.output.shape[1], state.counts)  # finished rows write nowhere
    counts = state.counts + ~state.is_done
    hit_stop = jnp.any(token_B[:, None] == stops, axis=-1)
    return dataclasses.replace(
        state,
        last=jnp.where(state.is_done, state.last, token_B),
        output=state.output.at[rows, column].set(token_B, mode="drop"),
        counts=counts,
        is_done=state.is_done | hit_stop | (counts >= state.limits),
    )


@partial(jax.jit, static_argnames="step", donate_argnames="state")
def decode(
    step: FlaxStep, params: Params, state: State, stops: Int[Array, "n"], strategy: Strategy, budget: Int[Array, ""]
) -> State:
    """Up to `budget` rounds; ends early when every row is done. `state` is donated."""

    def unfinished(carry: tuple[Array, State]) -> Array:
        rounds, state = carry
        return (rounds < budget) & ~jnp.all(state.is_done)

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        rounds, state = carry
        counts_B = 1 - state.is_done.astype(jnp.int32)
        logits_BTC, _, cache = step(params, state.last[:, None], state.cache, counts_B)
        return rounds + 1, _commit(dataclasses.replace(state, cache=cache), logits_BTC[:, 0], stops, strategy)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def row_keys(seeds: list[int]) -> Array:
    """One PRNG key per row."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def tokens_of(state: State) -> list[list[int]]:
    """The tokens generated so far, per row."""
    output, counts = jax.device_get((state.output, state.counts))
    return [row[:count].tolist() for row, count in zip(output, counts)]


def as_stops(ids: Any) -> Int[Array, "n"]:
    """Stop ids as an array that is never empty (-1 matches no token)."""
    return jnp.asarray([*ids, -1], jnp.int32)
