"""From a token to its experts: router, top-k, and the list of active experts.

Scores are formed of float32 weights and the bf16 stream, as a lower precision flips selections. No result of a token
depends on other tokens or on their number.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_step.hopper.config import (
    COLUMN_UNIT,
    CONSUMERS,
    INPUT_SHIFT,
    LOG2_E,
    SLOT_WORDS,
    WARPS,
    Columns,
    Inputs,
    padded,
)
from pallas_kernels.decode_step.hopper.picking import LEAST, ordered_key
from pallas_kernels.decode_step.hopper.products import BLOCK, TOKENS, Tile, summed
from pallas_kernels.lanes import WARP, WARPGROUP, Lanes, Memory, Value
from pallas_kernels.lanes.values import F32, I32

PIECES = 3  # bf16 numbers whose sum is a float32
WEIGHT_EPS = 1e-20


@dataclasses.dataclass(frozen=True)
class Router:
    """The router of `experts` experts, of which CTA c scores numbers c * experts // ctas up to those of CTA c + 1.

    Its weights are the N operand of `mma.m16n8k16`, each as three columns, and tokens are the M operand.
    """

    experts: int
    width: int
    ctas: int

    @property
    def rows(self) -> int:
        """The most experts of a CTA."""
        return -(-self.experts // self.ctas)

    @property
    def pieces(self) -> int:
        """Columns of the product: an expert's three side by side."""
        return PIECES * self.rows

    @property
    def groups(self) -> int:
        """Instructions that have them all."""
        return -(-self.pieces // TOKENS)

    @property
    def cols(self) -> int:
        return padded(self.width, COLUMN_UNIT)

    @property
    def columns(self) -> Columns:
        """Parts in as few chunks as slots have room for, of whole blocks for each warp."""
        part, unit = Columns(self.cols, 1).part_cols, WARPS * BLOCK
        fits = lambda chunks: self.pieces * part // chunks <= 2 * SLOT_WORDS  # noqa: E731
        chunks = next((n for n in range(1, part // unit) if part % (n * unit) == 0 and fits(n)), part // unit)
        return Columns(self.cols, chunks)

    @property
    def slot_words(self) -> int:
        return self.pieces * self.columns.chunk_cols // 2

    @property
    def teams(self) -> int:
        """That have chunks."""
        return min(CONSUMERS, self.columns.chunks)

    def sums(self, tokens: int) -> int:
        """Floats of the sums of all warps."""
        return self.teams * WARPS * self.groups * TOKENS * tokens

    def bounds(self) -> np.ndarray:
        """The first expert of each CTA, and where the last one's end."""
        return np.arange(self.ctas + 1) * self.experts // self.ctas


def pack_router(weights_ED: Any, router: Router) -> Any:
    """float32 [experts, width] -> int32 [ctas, chunks, slot_words]: bf16 [blocks of 32 columns, pieces, 32].

    A CTA's rows of a chunk, zeros where it has fewer.
    """
    xp = np if isinstance(weights_ED, np.ndarray) else jnp
    first = router.bounds()
    numbers = first[:-1, None] + np.arange(router.rows)
    numbers = np.where(numbers < first[1:, None], numbers, router.experts)
    left = xp.pad(weights_ED, ((0, 1), (0, router.cols - router.width)))[numbers]
    pieces: list[Any] = []
    for _ in range(PIECES):
        pieces.append(left.astype(jnp.bfloat16))
        left = left - pieces[-1].astype(np.float32)
    stacked = xp.stack(pieces, axis=2).reshape(router.ctas, router.pieces, router.columns.chunks, -1, BLOCK)
    stacked = xp.transpose(stacked, (0, 2, 3, 1, 4)).reshape(router.ctas, router.columns.chunks, -1)
    return np.ascontiguousarray(stacked).view(np.int32) if xp is np else stacked.view(np.int32)


def unpack_router(packed: Any, router: Router) -> Any:
    """The inverse of `pack_router`."""
    xp = np if isinstance(packed, np.ndarray) else jnp
    pieces = packed.view(jnp.bfloat16).astype(np.float32)
    pieces = pieces.reshape(router.ctas, router.columns.chunks, -1, router.rows, PIECES, BLOCK)
    rows = pieces[..., 0, :] + pieces[..., 1, :] + pieces[..., 2, :]
    rows = xp.transpose(rows, (0, 3, 1, 2, 4)).reshape(router.ctas, router.rows, router.cols)
    first, number = router.bounds(), np.arange(router.experts)
    cta = np.searchsorted(first, number, side="right") - 1
    return rows[cta, number - first[cta], : router.width]


def multiply_router(router: Router, tokens: int) -> Tile:
    """Adds a chunk's products to a team's sums, for `score` to add up; each warp has a quarter of the columns.

    Memories: slot int32 [slot_words]; page int32, a token's inputs every part_cols / 2 + PAGE_GAP words, those of
    experts; sums float32 [teams, WARPS, groups * 8, tokens]. Scalars: team; first, the page's word with the chunk's
    first column of token 0; is_first, 1 if the team's sums begin with this chunk.
    """
    columns, last = router.columns, router.pieces - 1
    token_words, blocks = Inputs(columns, tokens).token_words, columns.chunk_cols // (WARPS * BLOCK)

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        slot, page, sums = memories
        zero, no_token = lanes.constant(0.0, F32), [lanes.constant(0, I32)] * 4
        row, quad = lanes.lane // 4, lanes.lane % 4
        inputs = scalars["first"] + lanes.warp * (blocks * BLOCK // 2) + row * token_words + quad * 4
        pieces = [(row + first).minimum(last) for first in range(0, router.pieces, TOKENS)]
        weights = [(lanes.warp * (blocks * router.pieces) + piece) * (BLOCK // 2) + quad * 4 for piece in pieces]
        found = [[zero] * 4 for _ in pieces]
        for block in range(blocks):
            low, high = (
                lanes.load(page, inputs + block * (BLOCK // 2) + first * token_words, I32, 4)
                if first < tokens
                else no_token
                for first in (0, TOKENS)
            )
            for group, at in enumerate(weights):
                b = lanes.load(slot, at + block * (router.pieces * BLOCK // 2), I32, 4)
                for k in (0, 2):
                    a = [low[k], high[k], low[k + 1], high[k + 1]]
                    found[group] = lanes.mma(a, b[k : k + 2], found[group])
        begins, own = scalars["is_first"].equals(1), scalars["team"] * WARPS + lanes.warp
        for group, values in enumerate(found):
            for index, value in enumerate(values[: tokens // TOKENS * 2]):
                piece, token = quad * 2 + (group * TOKENS + index % 2), row + index // 2 * TOKENS
                at = (own * (router.groups * TOKENS) + piece) * tokens + token
                lanes.store([lanes.select(begins, zero, lanes.load_one(sums, at)) + value], sums, at)

    return tile


def score(router: Router, tokens: int) -> Tile:
    """Sigmoids of the CTA's experts, of the inputs that experts read. Four threads share one, a team's sums each.

    Memories: sums as `multiply_router` leaves them; factors float32 [tokens], of bf16 inputs; scores float32
    [tokens, experts]. Scalars: cta.
    """
    results, size = tokens * router.rows, router.groups * TOKENS * tokens

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        sums, factors, scores = memories
        first, end = ((scalars["cta"] + i) * router.experts // router.ctas for i in range(2))
        for begin in range(0, results * CONSUMERS, WARPGROUP):
            number, team = (lanes.thread + begin) // CONSUMERS, lanes.thread % CONSUMERS
            place = number.minimum(results - 1)
            token, row = place // router.rows, place % router.rows
            own = team.minimum(router.teams - 1) * (WARPS * size) + row * (PIECES * tokens) + token
            parts = [own + (warp * size + piece * tokens) for warp in range(WARPS) for piece in range(PIECES)]
            total = summed([lanes.load_one(sums, part) for part in parts])
            total = lanes.sum_over(lanes.select(team < router.teams, total, lanes.constant(0.0, F32)), CONSUMERS)
            logit = total * (lanes.load_one(factors, token) * 2.0 ** -INPUT_SHIFT["mxfp4"])
            sigmoid = lanes.reciprocal(lanes.exp2(logit * -LOG2_E) + 1.0)
            with lanes.when(team.equals(0) & (number < results) & (first + row < end)):
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
            places = [number.minimum(experts - 1) for number in numbers]
            found = [lanes.load_one(scores, row + place) for place in places]
            added = [lanes.load_one(bias, scalars["bias_first"] + place) for place in places]
            keys = [
                lanes.select(number < experts, ordered_key(lanes, value + more), least)
                for number, value, more in zip(numbers, found, added)
            ]

            def choose(choice: Value, picked: Value, value: Value, *keys: Value) -> list[Value]:
                number = _largest(lanes, keys, numbers)
                is_it, none = [own.equals(number) for own in numbers], lanes.constant(0, I32)
                bits = [lanes.select(own, score.as_int(), none) for own, score in zip(is_it, found)]
                left = [lanes.select(own, least, key) for own, key in zip(is_it, keys)]
                mine, score = lane.equals(choice), lanes.over_warp("or", _tree(operator.or_, bits)).as_float()
                return [lanes.select(mine, number, picked), lanes.select(mine, score, value), *left]

            # Thread `choice` keeps what was picked, and its score.
            nothing = [lanes.constant(0, I32), lanes.constant(0, F32)]
            picked, value = lanes.loop(0, chosen, 1, choose, [*nothing, *keys])[:2]
            value = lanes.select(is_chosen, value, nothing[1])
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


def _largest(lanes: Lanes, keys: Sequence[Value], numbers: Sequence[Value]) -> Value:
    """The least number that has the largest key of a warp."""
    key = lanes.over_warp("max", _tree(Value.maximum, keys))
    nobody = lanes.constant(2**31 - 1, I32)
    found = [lanes.select(own.equals(key), number, nobody) for own, number in zip(keys, numbers)]
    return lanes.over_warp("min", _tree(Value.minimum, found))


def _tree(operation: Callable[[Value, Value], Value], values: Sequence[Value]) -> Value:
    """All values as one; a chain would wait for each of its steps."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return operation(_tree(operation, values[:half]), _tree(operation, values[half:]))


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
