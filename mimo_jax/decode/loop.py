"""Decoding on device: prefill in bucketed chunks, then one jitted while_loop over a donated state.

A round of the loop is draft -> verify -> commit, by a step (`decode.step`) and a drafter (`decode.drafter`). Plain
decoding is the same loop with a drafter that proposes nothing; streaming is the same loop with a small budget of rounds
per visit of the host; a server is the same loop with rows that come and go between visits. Only where the host must see
the drafts before they are verified is a round made of two calls, `propose` and `commit`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from mimo_jax.config.model import MAX_BLOCK
from mimo_jax.decode.controls import Controls, Logprobs, adjusted, empty_logprobs, masked, recorded
from mimo_jax.decode.drafter import PLAIN, Draft, DraftContext, Drafter, ReadTokens, Weights
from mimo_jax.decode.sampling import draw
from mimo_jax.decode.step import Step
from mimo_jax.decode.verify import verify
from mimo_jax.modeling.backbone import MEDIA
from mimo_jax.sharding import place, using

CAPACITY_BUCKETS = tuple(2**power for power in range(8, 21))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What runs a round: the step, the drafter, and the rule that verifies sampled drafts."""

    step: Step
    drafter: Drafter = PLAIN
    rule: str = "block"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counters:
    """What speculation did for each row: rounds, and per draft position how often it was put to the test and accepted.

    Position m is tested in rounds that accepted every one before it. Tokens beyond a row's end count nowhere.
    """

    rounds: Int[Array, "B"]
    tested: Int[Array, "B M"]
    accepted: Int[Array, "B M"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries. `last` is committed but not yet in the cache; `output` holds the generated tokens, and
    `rounds` the round that each came from: 0 for the prefill. `logprobs` are kept where they are asked for.
    """

    cache: Any  # the step's
    draft_cache: Any
    last: Int[Array, "B"]
    output: Int[Array, "B S"]
    rounds: Int[Array, "B S"]
    counts: Int[Array, "B"]
    limits: Int[Array, "B"]
    is_done: Bool[Array, "B"]
    keys: Array
    counters: Counters
    logprobs: Logprobs | None = None


@contextmanager
def usual_numbers() -> Iterator[None]:
    """JAX as this package is written for, whatever the user has set: 32 bits, dtypes and ranks that may mix."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def capacity_for(tokens: int) -> int:
    """Cache rows for `tokens` tokens: the smallest bucket that also holds one block beyond them."""
    return next((size for size in CAPACITY_BUCKETS if size >= tokens + MAX_BLOCK), tokens + MAX_BLOCK)


def prefill_chunks(length: int, buckets: tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, size) of the chunks that cover `length` tokens; every size is a bucket, the last chunk is padded."""
    chunks, start = [], 0
    while start < length:
        rest = min(length - start, buckets[-1])
        chunks.append((start, next(size for size in buckets if size >= rest)))
        start += chunks[-1][1]
    return chunks


@partial(jax.jit, static_argnames="decoder", donate_argnames=("cache", "draft_cache", "logits_BC"))
def _prefill_chunk(decoder, weights, tokens_BT, counts_B, cache, draft_cache, logits_BC):
    """Runs one chunk; rows that end in it get their next-token logits."""
    before_B = cache.lengths
    new_B1C, features, cache = decoder.step(weights.target, tokens_BT, cache, counts_B, "last")
    text_BT = jnp.where(tokens_BT < decoder.step.config.vocab_size, tokens_BT, 0)
    read = ReadTokens(tokens_BT, text_BT, features, before_B, counts_B)
    draft_cache = decoder.drafter.update_cache(weights, draft_cache, read)
    return cache, draft_cache, jnp.where((counts_B > 0)[:, None], new_B1C[:, 0], logits_BC)


def with_media(weights: Weights, rows_RD: Float[Any, "R D"] | None) -> Weights:
    """`weights` for reading a prompt with media, whose ids beyond the vocabulary stand for rows of `rows_RD`.

    Every number of rows is a program of its own: they come in few sizes (`media.prompt.batched`).
    """
    if rows_RD is None:
        return weights
    return dataclasses.replace(weights, target={**weights.target, MEDIA: rows_RD})


def empty_caches(decoder: Decoder, batch: int, capacity: int) -> tuple[Any, Any, Float[Array, "B C"]]:
    """What prefill fills: the step's cache, the drafter's, and the logits after what has been read."""
    caches, logits_BC = _empty(decoder, batch, capacity)
    return *place(caches, decoder.step.mesh), logits_BC


@partial(jax.jit, static_argnames=("decoder", "batch", "capacity"))
def _empty(decoder: Decoder, batch: int, capacity: int) -> tuple[tuple[Any, Any], Float[Array, "B C"]]:
    """In one program: a dispatch for each array would take longer than reading a question."""
    caches = (decoder.step.init_cache(batch, capacity), decoder.drafter.init_cache(batch, capacity))
    return caches, jnp.zeros((batch, decoder.step.config.vocab_size), jnp.float32)


def read_chunk(
    decoder: Decoder, weights: Weights, tokens_BT: Int[Any, "B T"], counts_B: Int[Any, "B"], caches: tuple
) -> tuple[Any, Any, Float[Array, "B C"]]:
    """`caches`, those of `empty_caches` at first, after `counts_B` more tokens of each row. They are donated."""
    with usual_numbers():
        return _prefill_chunk(decoder, weights, tokens_BT, counts_B, *caches)


def prefill(
    decoder: Decoder, weights: Weights, prompts: list[list[int]], capacity: int
) -> tuple[Any, Any, Float[Array, "B C"]]:
    """Fills fresh caches with the prompts (token ids, none empty); the logits follow each prompt's last token."""
    with usual_numbers():
        return _prefill(decoder, weights, prompts, capacity)


def _prefill(decoder: Decoder, weights: Weights, prompts: list[list[int]], capacity: int) -> tuple[Any, Any, Array]:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    cache, draft_cache, logits_BC = empty_caches(decoder, len(prompts), capacity)
    for start, size in prefill_chunks(int(lengths.max()), decoder.step.prefill_buckets):
        tokens = np.zeros((len(prompts), size), np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + size]
            tokens[row, : len(piece)] = piece
        counts = np.clip(lengths - start, 0, size).astype(np.int32)
        cache, draft_cache, logits_BC = _prefill_chunk(decoder, weights, tokens, counts, cache, draft_cache, logits_BC)
    return cache, draft_cache, logits_BC


def start(
    decoder: Decoder,
    cache: Any,
    draft_cache: Any,
    logits_BC: Float[Array, "B C"],
    limits_B: Int[Array | np.ndarray, "B"],
    keys_B: Array,
    controls: Controls,
    masks_BW: UInt32[Any, "B W"] | None = None,
    most_logprobs: int | None = None,
) -> State:
    """The state after the first token, drawn from the prefill's logits. The caches are donated.

    `masks_BW` are the tokens that it may be, see `controls.masked`; `most_logprobs` is how many logarithms are kept in
    each place beside the token's own, None for no logarithms at all.
    """
    with usual_numbers():
        return _start(
            decoder, cache, draft_cache, logits_BC, limits_B, keys_B, controls, masks_BW, most_logprobs=most_logprobs
        )


@partial(jax.jit, static_argnames=("decoder", "most_logprobs"), donate_argnames=("cache", "draft_cache"))
def _start(
    decoder, cache, draft_cache, logits_BC, limits_B, keys_B, controls, masks_BW=None, most_logprobs: int | None = None
) -> State:
    batch, capacity = limits_B.shape[0], cache.capacity
    zeros_B, zeros_BM = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, decoder.drafter.block_size - 1), jnp.int32)
    state = State(
        cache=cache,
        draft_cache=draft_cache,
        last=zeros_B,
        output=jnp.zeros((batch, capacity), jnp.int32),
        rounds=jnp.zeros((batch, capacity), jnp.int32),
        counts=zeros_B,
        limits=limits_B,
        is_done=limits_B <= 0,
        keys=keys_B,
        counters=Counters(zeros_B, zeros_BM, zeros_BM),
        logprobs=None if most_logprobs is None else empty_logprobs(batch, capacity, most_logprobs),
    )
    none_B0, masks_B1W = jnp.zeros((batch, 0), jnp.int32), None if masks_BW is None else masks_BW[:, None]
    drawn_B1C = masked(masks_B1W, _adjusted(controls, state, logits_BC[:, None], none_B0))
    first_B = draw(controls.strategy, drawn_B1C[:, 0], _round_keys(state), decoder.step.search)
    state, _ = _emit(state, first_B[:, None], jnp.ones_like(zeros_B), controls, logits_BC[:, None])
    return dataclasses.replace(state, rounds=jnp.zeros_like(state.rounds))


def _adjusted(controls: Controls, state: State, logits_BNC: Array, drafts_BM: Array) -> Array:
    return adjusted(controls.adjustments, logits_BNC, state.output, state.counts, drafts_BM)


def _round_keys(state: State) -> Array:
    """Randomness of a round depends on the row's key and position only, never on its batch mates."""
    return jax.vmap(jax.random.fold_in)(state.keys, state.counts)


def _emit(
    state: State, tokens_BN: Array, offered_B: Array, controls: Controls, logits_BNC: Array
) -> tuple[State, Array]:
    """Appends the first `offered_B` tokens of every unfinished row, as far as its limit and its first stop.

    `logits_BNC` are the model's in their places. Returns how many were appended, too; of finished rows none are.
    """
    batch, size = tokens_BN.shape
    row_N = jnp.arange(size)
    is_stop_BN = jnp.any(tokens_BN[..., None] == controls.stops_BS[:, None], axis=-1)
    to_stop_B = jnp.min(jnp.where(is_stop_BN, row_N + 1, size), axis=-1)
    kept_B = jnp.minimum(jnp.minimum(offered_B, to_stop_B), state.limits - state.counts)
    kept_B = jnp.where(state.is_done, 0, kept_B)
    is_kept_BN = row_N < kept_B[:, None]
    column_BN = jnp.where(is_kept_BN, state.counts[:, None] + row_N, state.output.shape[1])  # else nowhere
    index, number_B1 = (jnp.arange(batch)[:, None], column_BN), state.counters.rounds[:, None] + 1
    newest_B = jnp.take_along_axis(tokens_BN, jnp.maximum(kept_B - 1, 0)[:, None], axis=1)[:, 0]
    counts_B = state.counts + kept_B
    stopped_B = jnp.any(is_stop_BN & is_kept_BN, axis=-1)
    emitted = dataclasses.replace(
        state,
        last=jnp.where(kept_B > 0, newest_B, state.last),
        output=state.output.at[index].set(tokens_BN, mode="drop"),
        rounds=state.rounds.at[index].set(jnp.broadcast_to(number_B1, column_BN.shape), mode="drop"),
        counts=counts_B,
        is_done=state.is_done | stopped_B | (counts_B >= state.limits),
        logprobs=recorded(state.logprobs, logits_BNC, tokens_BN, column_BN),
    )
    return emitted, kept_B


def _round(decoder: Decoder, weights: Weights, state: State, controls: Controls) -> State:
    """One round of every unfinished row: draft, verify in one pass of the target, commit what was accepted."""
    return _commit(decoder, weights, state, controls, _propose(decoder, weights, state, controls), None)


def _propose(decoder: Decoder, weights: Weights, state: State, controls: Controls) -> Draft:
    context = DraftContext(
        weights,
        state.draft_cache,
        state.last,
        state.cache.lengths,
        controls.strategy,
        _round_keys(state),
        decoder.step.search,
    )
    with using(decoder.step.mesh):
        return decoder.drafter.propose(context)


def _commit(
    decoder: Decoder, weights: Weights, state: State, controls: Controls, draft: Draft, masks_BNW: Array | None
) -> State:
    drafter, keys_B, before_B = decoder.drafter, _round_keys(state), state.cache.lengths
    tokens_BN = jnp.concatenate([state.last[:, None], draft.tokens], axis=1)
    proposed_B = jnp.full_like(state.counts, draft.tokens.shape[1]) if draft.counts is None else draft.counts
    read_B = jnp.where(state.is_done, 0, 1 + proposed_B)
    logits_BNC, features, cache = decoder.step(weights.target, tokens_BN, state.cache, read_B)
    is_plain = controls.adjustments is None and masks_BNW is None
    drawn_BNC = masked(masks_BNW, _adjusted(controls, state, logits_BNC, draft.tokens))
    accepted_B, next_B = verify(
        controls.strategy,
        decoder.rule,
        drawn_BNC,
        draft.tokens,
        draft.probabilities,
        keys_B,
        features.best if is_plain else None,
        draft.counts,
        decoder.step.search,
    )

    row_N = jnp.arange(tokens_BN.shape[1])
    padded_BN = jnp.concatenate([draft.tokens, next_B[:, None]], axis=1)
    offered_BN = jnp.where(row_N < accepted_B[:, None], padded_BN, next_B[:, None])
    emitted, kept_B = _emit(state, offered_BN, accepted_B + 1, controls, logits_BNC)
    # The anchor and the accepted drafts have been read; the newest token has not. The rest of the block is taken back.
    read = ReadTokens(tokens_BN, tokens_BN, features, before_B, kept_B)
    draft_cache = drafter.update_cache(weights, state.draft_cache, read)
    return dataclasses.replace(
        emitted,
        cache=dataclasses.replace(cache, lengths=before_B + kept_B),
        draft_cache=draft_cache,
        counters=_count(state.counters, proposed_B, accepted_B, kept_B),
    )


def _count(counters: Counters, proposed_B: Array, accepted_B: Array, kept_B: Array) -> Counters:
    draft_M = jnp.arange(counters.tested.shape[1])
    tested_BM = draft_M < jnp.minimum(kept_B, proposed_B)[:, None]
    return Counters(
        rounds=counters.rounds + (kept_B > 0),
        tested=counters.tested + tested_BM,
        accepted=counters.accepted + (tested_BM & (draft_M < accepted_B[:, None])),
    )


def decode(
    decoder: Decoder,
    weights: Weights,
    state: State,
    controls: Controls,
    budget: int,
    held_B: Bool[Any, "B"] | None = None,
    is_eager: bool = False,
) -> State:
    """Up to `budget` rounds; ends early when every row is done, or if it `is_eager` when any is. `state` is donated.

    Rows that are `held_B` stay as they are.
    """
    with usual_numbers():
        return _decode(decoder, weights, state, controls, np.int32(budget), held_B, np.bool_(is_eager))


@partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def _decode(
    decoder: Decoder,
    weights: Weights,
    state: State,
    controls: Controls,
    budget: Int[Array, ""],
    held_B: Bool[Array, "B"] | None = None,
    is_eager: Bool[Any, ""] = np.False_,
) -> State:
    begun = _holding(state, held_B)

    def unfinished(carry: tuple[Array, State]) -> Array:
        rounds, state = carry
        is_ended = jnp.all(state.is_done) | (is_eager & jnp.any(state.is_done & ~begun.is_done))
        return (rounds < budget) & ~is_ended

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        rounds, state = carry
        return rounds + 1, _round(decoder, weights, state, controls)

    return _released(state, jax.lax.while_loop(unfinished, body, (jnp.int32(0), begun))[1], held_B)


def _holding(state: State, held_B: Array | None) -> State:
    return state if held_B is None else dataclasses.replace(state, is_done=state.is_done | held_B)


def _released(before: State, state: State, held_B: Array | None) -> State:
    if held_B is None:
        return state
    return dataclasses.replace(state, is_done=jnp.where(held_B, before.is_done, state.is_done))


def propose(decoder: Decoder, weights: Weights, state: State, controls: Controls) -> Draft:
    """What the drafter proposes, for the host to see; `commit` goes on with it."""
    with usual_numbers():
        return _propose_alone(decoder, weights, state, controls)


_propose_alone = jax.jit(_propose, static_argnames="decoder")


def commit(
    decoder: Decoder,
    weights: Weights,
    state: State,
    controls: Controls,
    draft: Draft,
    masks_BNW: UInt32[Any, "B N W"],
    held_B: Bool[Any, "B"],
) -> State:
    """Verifies a draft when only the tokens of `masks_BNW` are possible after each of its tokens. `state` is donated.

    Masks belong to the model: what is generated has exactly the distribution of the masked model.
    """
    with usual_numbers():
        return _commit_alone(decoder, weights, state, controls, draft, masks_BNW, held_B)


@partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def _commit_alone(decoder, weights, state, controls, draft, masks_BNW, held_B) -> State:
    begun = _holding(state, held_B)
    return _released(state, _commit(decoder, weights, begun, controls, draft, masks_BNW), held_B)


def row_keys(seeds: list[int]) -> Array:
    """One PRNG key per row."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def progress(state: State) -> tuple[list[list[int]], list[bool]]:
    """The tokens generated so far, and whether that is all, per row."""
    output, counts, is_done = jax.device_get((state.output, state.counts, state.is_done))
    return [row[:count].tolist() for row, count in zip(output, counts)], is_done.tolist()
