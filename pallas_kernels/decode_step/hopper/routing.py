"""From a token to its experts: router, top-k, and the list of active experts.

Scores are formed in float32 from the bf16 stream, as a lower precision flips selections. No result of a token depends
on other tokens or on their number.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_step.hopper.config import COLUMN_UNIT, LOG2_E, WARPS, Columns, Inputs, padded
from pallas_kernels.decode_step.hopper.picking import LEAST, ordered_key
from pallas_kernels.decode_step.hopper.products import Tile
from pallas_kernels.lanes import WARP, WARPGROUP, Lanes, Memory, Value
from pallas_kernels.lanes.values import F32, I32

HALVES = 2  # of a chunk's columns, and of the tokens: a warp has one of each
PART_CHUNKS = 2  # of a part of the page
STEP_COLS = HALVES * 4 * WARP  # of a chunk: each thread reads four weights at once
WEIGHT_EPS = 1e-20


@dataclasses.dataclass(frozen=True)
class Router:
    """The router of `experts` experts, of which CTA c scores numbers c * experts // ctas up to those of CTA c + 1."""

    experts: int
    width: int
    ctas: int

    @property
    def rows(self) -> int:
        """The most experts of a CTA."""
        return -(-self.experts // self.ctas)

    @property
    def cols(self) -> int:
        return padded(self.width, COLUMN_UNIT)

    @property
    def columns(self) -> Columns:
        return Columns(self.cols, PART_CHUNKS)

    @property
    def slot_words(self) -> int:
        return self.rows * self.columns.chunk_cols

    def sums(self, tokens: int) -> int:
        """Floats of the sums of all chunks."""
        return self.columns.chunks * HALVES * self.rows * tokens

    def bounds(self) -> np.ndarray:
        """The first expert of each CTA, and where the last one's end."""
        return np.arange(self.ctas + 1) * self.experts // self.ctas


def pack_router(weights_ED: Any, router: Router) -> Any:
    """float32 [experts, width] -> [ctas, chunks, slot_words]: a CTA's rows of a chunk, zeros where it has fewer."""
    xp = np if isinstance(weights_ED, np.ndarray) else jnp
    first = router.bounds()
    numbers = first[:-1, None] + np.arange(router.rows)
    numbers = np.where(numbers < first[1:, None], numbers, router.experts)
    padded_ED = xp.pad(weights_ED, ((0, 1), (0, router.cols - router.width)))
    rows = padded_ED[numbers].reshape(router.ctas, router.rows, router.columns.chunks, -1)
    return xp.transpose(rows, (0, 2, 1, 3)).reshape(router.ctas, -1, router.slot_words)


def unpack_router(packed: Any, router: Router) -> Any:
    """The inverse of `pack_router`."""
    xp = np if isinstance(packed, np.ndarray) else jnp
    rows = packed.reshape(router.ctas, router.columns.chunks, router.rows, -1)
    rows = xp.transpose(rows, (0, 2, 1, 3)).reshape(router.ctas, router.rows, router.cols)
    first, number = router.bounds(), np.arange(router.experts)
    cta = np.searchsorted(first, number, side="right") - 1
    return rows[cta, number - first[cta], : router.width]


def multiply_router(router: Router, tokens: int) -> Tile:
    """A chunk's products, for `score` to add up.

    A warp has half of the tokens and half of the columns; its threads' sums are added as a tree.

    Memories: slot float32 [slot_words]; page int32, a token's part every part_cols / 2 + PAGE_GAP words, inputs bf16;
    sums float32 [chunks, 2, tokens, rows]. Scalars: chunk; first, the page's word with the chunk's first column of
    token 0.
    """
    columns = router.columns
    own, token_words = tokens // HALVES, Inputs(columns, tokens).token_words
    half_cols = columns.chunk_cols // HALVES

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        slot, page, sums = memories
        first_token, half = lanes.warp % HALVES * own, lanes.warp // HALVES
        column = half * half_cols + lanes.lane * 4
        inputs = scalars["first"] + first_token * token_words + column // 2

        def step(done: Value, *totals: Value) -> list[Value]:
            weights = [lanes.load(slot, column + done + row * columns.chunk_cols, F32, 4) for row in range(router.rows)]
            words = [lanes.load(page, inputs + done // 2 + token * token_words, I32, 2) for token in range(own)]
            inputs_of = [(*lanes.unpack(left), *lanes.unpack(right)) for left, right in words]
            pairs = itertools.product(inputs_of, weights)
            return [_dot(lanes, *pair, total) for pair, total in zip(pairs, totals)]

        zeros = [lanes.constant(0, F32)] * (own * router.rows)
        totals = _sum_over_warp(lanes, lanes.loop(0, half_cols, STEP_COLS // HALVES, step, zeros), own)
        threads = WARP // own
        token = first_token + lanes.lane // threads
        with lanes.when((lanes.lane % threads).equals(0)):
            index = ((scalars["chunk"] * HALVES + half) * tokens + token) * router.rows
            for row, total in enumerate(totals):
                lanes.store([total], sums, index + row)

    return tile


def score(router: Router, tokens: int) -> Tile:
    """Sigmoids of the CTA's experts.

    Memories: sums as `multiply_router` leaves them; factors float32 [tokens], of bf16 inputs; scores float32
    [tokens, experts]. Scalars: cta.
    """
    results = tokens * router.rows

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        sums, factors, scores = memories
        token, row = lanes.thread // router.rows, lanes.thread % router.rows
        first, end = ((scalars["cta"] + i) * router.experts // router.ctas for i in range(2))
        with lanes.when((lanes.thread < results) & (first + row < end)):
            total = lanes.constant(0, F32)
            for part in range(router.columns.chunks * HALVES):
                total = total + lanes.load_one(sums, lanes.thread + part * results)
            logit = total * lanes.load_one(factors, token)
            sigmoid = lanes.reciprocal(lanes.exp2(logit * -LOG2_E) + 1.0)
            lanes.store([sigmoid], scores, token * router.experts + first + row)

    return tile


def top_k(experts: int, chosen: int, tokens: int) -> Tile:
    """A warp chooses a token's experts: the largest score + bias, equals as `jax.lax.top_k` does; padding chooses none.

    Memories: scores float32 [tokens, experts]; bias float32; in shared memory ids int32 [tokens, chosen], `experts`
    for none, and weights float32 [tokens, chosen], scores over their sum. Scalars: team, the warpgroup's number, for
    the tokens from 4 * team on; count of real tokens; bias_first, the bias' element for expert 0.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        scores, bias, ids, weights = memories
        lane, token = lanes.lane, scalars["team"] * WARPS + lanes.warp
        with lanes.when(token < tokens):
            row, is_chosen, least = token * experts, lane < chosen, lanes.constant(LEAST, I32)
            numbers = [lane + first for first in range(0, experts, WARP)]
            keys = [_bias_key(lanes, scores, row, bias, scalars["bias_first"], number, experts) for number in numbers]

            def choose(choice: Value, picked: Value, *keys: Value) -> list[Value]:
                number = _largest(lanes, keys, numbers)
                left = [lanes.select(own.equals(number), least, key) for own, key in zip(numbers, keys)]
                return [lanes.select(lane.equals(choice), number, picked), *left]

            # Thread `choice` keeps what was picked.
            picked = lanes.loop(0, chosen, 1, choose, [lanes.constant(0, I32), *keys])[0]
            value = lanes.select(is_chosen, lanes.load_one(scores, row + picked), lanes.constant(0, F32))
            weight = value * lanes.reciprocal(lanes.sum_over(value) + WEIGHT_EPS)
            is_real = token < scalars["count"]
            with lanes.when(is_chosen):
                lanes.store([lanes.select(is_real, picked, lanes.constant(experts, I32))], ids, token * chosen + lane)
                lanes.store([lanes.select(is_real, weight, lanes.constant(0, F32))], weights, token * chosen + lane)

    return tile


def list_scratch(experts: int) -> int:
    """Words that `list_experts` needs: masks of each warp and of all, and how many experts precede a mask."""
    return (WARPS + 2) * -(-experts // WARP)


def list_experts(experts: int, chosen: int, tokens: int) -> Tile:
    """The experts that any token chose, ascending, and for each of them the tokens' pairs; a pair to each thread.

    Memories, all int32 in shared memory: ids [tokens, chosen]; scratch [list_scratch(experts)]; active [most], of which
    `count` [1] are written, and pairs [most, tokens], token * chosen + choice or -1; `most` is the least of experts and
    tokens * chosen. All threads see them when it returns.
    """
    pairs, masks = tokens * chosen, -(-experts // WARP)
    most, union, before = min(experts, pairs), WARPS * masks, (WARPS + 1) * masks
    if pairs > WARPGROUP or masks > WARP:
        raise ValueError(f"{pairs} pairs and {experts} experts are too many for a warpgroup to list")

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        ids, scratch, active, count, listed = memories
        thread, lane, none = lanes.thread, lanes.lane, lanes.constant(experts, I32)
        number = lanes.load_one(ids, thread.minimum(pairs - 1), I32)
        number = lanes.select(thread < pairs, number, none)
        _store_masks(lanes, number, number < experts, masks, scratch)
        for first in range(0, most * tokens, WARPGROUP):
            with lanes.when(thread + first < most * tokens):
                lanes.store([lanes.constant(-1, I32)], listed, thread + first)
        lanes.barrier()
        with lanes.when(lanes.warp.equals(0)):
            own = [lanes.load_one(scratch, lane.minimum(masks - 1) + warp * masks, I32) for warp in range(WARPS)]
            mask = lanes.select(lane < masks, own[0] | own[1] | own[2] | own[3], lanes.constant(0, I32))
            preceding, total = _exclusive_sum(lanes, lanes.popcount(mask))
            with lanes.when(lane < masks):
                lanes.store([mask], scratch, lane + union)
                lanes.store([preceding], scratch, lane + before)
            with lanes.when(lane.equals(0)):
                lanes.store([total], count, lane)
        lanes.barrier()

        def place(expert: Value) -> tuple[Value, Value]:
            """Whether an expert is active, and how many active ones precede it."""
            mask, bit = lanes.load_one(scratch, expert // WARP + union, I32), lanes.constant(1, I32) << (expert % WARP)
            preceding = lanes.load_one(scratch, expert // WARP + before, I32)
            return (mask & bit).equals(bit), preceding + lanes.popcount(mask & (bit - 1))

        with lanes.when(number < experts):
            lanes.store([thread], listed, place(number)[1] * tokens + thread // chosen)
        for first in range(0, experts, WARPGROUP):
            with lanes.when(thread + first < experts):
                is_active, index = place(thread + first)
                with lanes.when(is_active):
                    lanes.store([thread + first], active, index)
        lanes.barrier()

    return tile


def count_experts(experts: int, chosen: int, tokens: int) -> Tile:
    """How many real tokens chose each expert; for one CTA, when there is time.

    Memories: active, count and pairs as `list_experts` leaves them; counts int32. Scalars: counts_first, the counts'
    element for expert 0.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        active, count, listed, counts = memories
        thread, zero, one = lanes.thread, lanes.constant(0, I32), lanes.constant(1, I32)
        for first in range(0, experts, WARPGROUP):
            with lanes.when(thread + first < experts):
                lanes.store([zero], counts, scalars["counts_first"] + thread + first)
        lanes.barrier()
        with lanes.when(thread < lanes.load_one(count, zero, I32)):
            total = zero
            for first in range(0, tokens, 4):
                for pair in lanes.load(listed, thread * tokens + first, I32, 4):
                    total = total + lanes.select(pair >= 0, one, zero)
            lanes.store([total], counts, scalars["counts_first"] + lanes.load_one(active, thread, I32))

    return tile


def _dot(lanes: Lanes, values: Sequence[Value], weights: Sequence[Value], total: Value) -> Value:
    for value, weight in zip(values, weights):
        total = lanes.fma(value, weight, total)
    return total


def _sum_over_warp(lanes: Lanes, values: Sequence[Value], tokens: int) -> list[Value]:
    """Sums over a warp of values [tokens, rows]; a thread is left with those of token lane // (32 / tokens)."""
    by = WARP // 2
    while by:
        if by * tokens >= WARP:
            is_upper, half = (lanes.lane & by).equals(by), len(values) // 2
            pairs = list(zip(values[:half], values[half:]))
            given = [lanes.select(is_upper, low, high) for low, high in pairs]
            values = [lanes.select(is_upper, high, low) for low, high in pairs]
        else:
            given = values
        values = [value + lanes.shuffle(other, by) for value, other in zip(values, given)]
        by //= 2
    return list(values)


def _bias_key(
    lanes: Lanes, scores: Memory, row: Value, bias: Memory, first: Value, number: Value, experts: int
) -> Value:
    expert = number.minimum(experts - 1)
    key = ordered_key(lanes, lanes.load_one(scores, row + expert) + lanes.load_one(bias, first + expert))
    return lanes.select(number < experts, key, lanes.constant(LEAST, I32))


def _largest(lanes: Lanes, keys: Sequence[Value], numbers: Sequence[Value]) -> Value:
    """The least number that has the largest key of a warp."""
    key = lanes.over_warp("max", functools.reduce(Value.maximum, keys))
    nobody = lanes.constant(2**31 - 1, I32)
    found = [lanes.select(own.equals(key), number, nobody) for own, number in zip(keys, numbers)]
    return lanes.over_warp("min", functools.reduce(Value.minimum, found))


def _store_masks(lanes: Lanes, number: Value, exists: Value, masks: int, scratch: Memory) -> None:
    """A bit for each expert that the threads of a warp name: int32 [warps, masks]."""
    bit = lanes.select(exists, lanes.constant(1, I32) << (number % WARP), lanes.constant(0, I32))
    own = lanes.constant(0, I32)
    for index in range(masks):
        mask = lanes.over_warp("or", lanes.select((number // WARP).equals(index), bit, lanes.constant(0, I32)))
        own = lanes.select(lanes.lane.equals(index), mask, own)
    with lanes.when(lanes.lane < masks):
        lanes.store([own], scratch, lanes.warp * masks + lanes.lane)


def _exclusive_sum(lanes: Lanes, value: Value) -> tuple[Value, Value]:
    """Over a warp: what the threads before this one have, and what all have."""
    before, total, by = lanes.constant(0, I32), value, 1
    while by < WARP:
        other = lanes.shuffle(total, by)
        before = lanes.select((lanes.lane & by).equals(by), before + other, before)
        total, by = total + other, 2 * by
    return before, total
