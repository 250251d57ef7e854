"""Attention of one device's heads for one batch row: rotation, the cache, blocks of keys, and the sum of their parts.

The order is that of FlashAttention-2 (arXiv 2307.08691): a warp keeps 16 queries' running maximum, sum and weighted
values in registers while blocks of 16 keys pass by; parts of the keys are merged by their numbers. What is multiplied
is bf16, as in the Flax module: queries, keys, values, exponentials. Sums are f32, maxima in units of log 2.

A token has the same bits alone and in a block: blocks begin at multiples of 16 positions and belong to a part by their
number, new tokens' keys come from one place whether the cache has them already or not, and a key that a query does not
see changes no bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

from pallas_kernels.decode_step.hopper.config import CONSUMER_THREADS, LOG2_E, ROWS, Inputs, padded
from pallas_kernels.lanes import WARP, WARPGROUP, Lanes, Memory, Value
from pallas_kernels.lanes.values import I32

KEYS = 16  # of a block: what one slot of the ring holds, and K of the instruction that multiplies with values
GAP = 8  # numbers after each row of a cache, so that eight rows' 16 bytes lie in different banks
MASKED = -1e30  # finite: what is subtracted from it has to be a number
AHEAD = 2  # items whose loads from global memory a thread has under way at a time
PARTS_AHEAD = 4  # the same of parts
Scalars = dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Attention:
    """Sizes of one kind of layer on one device; letters as in `mimo_jax/glossary.md`.

    Query rows are the queries of a key head: row `token * group + head`, in tiles of 16.
    """

    tokens: int  # T, padded
    heads: int  # H
    kv_heads: int  # K
    chunks: int  # J: of the rows of QKV, each [Q heads, K heads, V heads]
    head_dim: int  # Q, even
    value_dim: int  # V, even
    rotary: int  # dimensions that are rotated; a multiple of 4
    cache_rows: int  # S, a multiple of KEYS: the capacity, or the size of the ring
    positions: int  # that the table of angles has
    window: int | None  # keys that a query sees, its own included; None: all
    value_scale: float
    has_sink: bool
    qkv_stride: int  # floats between tokens of QKV, even
    attended: Inputs  # where what comes out is read, H * V columns
    split: int = 1  # warps that share a tile of queries: each has its columns of the values, and all of the scores

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def query_rows(self) -> int:
        return self.tokens * self.group

    @property
    def tiles(self) -> int:
        """Of a key head's queries; the last one may have rows of zeros."""
        return -(-self.query_rows // ROWS)

    @property
    def key_words(self) -> int:
        """Of a row of keys, in the cache, in a slot and among the new ones; of a row of queries too."""
        return (padded(self.head_dim, ROWS) + GAP) // 2

    @property
    def value_cols(self) -> int:
        return padded(self.value_dim, ROWS)

    @property
    def value_words(self) -> int:
        return (self.value_cols + GAP) // 2

    @property
    def slot_words(self) -> int:
        """A block: its rows of keys, then those of values."""
        return KEYS * (self.key_words + self.value_words)

    @property
    def part_stride(self) -> int:
        """Floats of a query row in a buffer of parts: weighted values, maximum, sum, and two that nobody reads."""
        return self.value_cols + 4

    @property
    def warp_cols(self) -> int:
        return self.value_cols // self.split

    def first_state(self) -> list[float]:
        """Of `attend_block`: of two query rows the maxima and a fourth of the sums and of the weighted values."""
        return [MASKED] * 2 + [0.0] * (2 + self.warp_cols // 2)


def blocks_of(config: Attention, length: Any, count: Any, part: Any, parts: Any) -> tuple[Any, Any]:
    """The first block that is a part's, and the number of them: block b is positions 16 b to 16 b + 15.

    Of those that any of `count` queries after `length` positions sees. Integers, traced or not, in a role warp too.
    """
    oldest = 0 if config.window is None else lax.max(length - (config.window - 1), 0)
    first, last = lax.div(oldest, KEYS), lax.div(length + count - 1, KEYS)
    first = first + lax.rem(part + parts - lax.rem(first, parts), parts)
    return first, lax.div(last - first + parts, parts)


def place_of(config: Attention, block: Any) -> Any:
    """Which block of 16 rows of the cache has a block's keys."""
    return lax.rem(block, config.cache_rows // KEYS)


def attend_block(config: Attention) -> Callable[..., list[Value]]:
    """A slot's keys, those of block `block`, for the warps' tiles of queries; state in, state out.

    Warp w of the warpgroup has part (first + w) % split of tile (first + w) // split, if there is one among the CTA's
    `tiles`; else it keeps its state. `first` may be negative where tiles are not split: -team gives a single tile to
    another warp of each warpgroup, and so to another tensor core.
    Memories, all shared: queries, keys, values as `prepare` left them; slot, words [slot_words]. Rows of new tokens are
    written into the slot first: the same bits from each warpgroup that does it. State as `Attention.first_state` says.
    Scalars: block, length, count, first, tiles, first_tile (the layer's number of tile 0).
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: Scalars, state: list[Value]) -> list[Value]:
        queries, keys, values, slot = memories
        _write_new(config, lanes, (keys, values), slot, scalars)
        lanes.barrier()
        mine, part, is_real = _work(config, lanes, scalars)

        def attend(*state: Value) -> list[Value]:
            scores = _scores(config, lanes, queries, slot, mine)
            visible = _visible(config, lanes, scalars, mine)
            return _update(config, lanes, slot, part * config.warp_cols, scores, visible, state)

        return lanes.branch(is_real, attend, state)

    return tile


def _work(config: Attention, lanes: Lanes, scalars: Scalars) -> tuple[Value, Value, Value]:
    """A warp's tile, its part of the value columns, and whether there is such a tile."""
    number = scalars["first"] + lanes.warp
    is_real = (number >= 0) & (number < scalars["tiles"] * config.split)
    if config.split == 1:
        return number, lanes.constant(0, I32), is_real
    return number // config.split, number % config.split, is_real


def _write_new(config: Attention, lanes: Lanes, new: Sequence[Memory], slot: Memory, scalars: Scalars) -> None:
    """Only real tokens: what others hold may not be a number, which a probability of zero would not undo."""
    start = 0
    for rows, words in zip(new, (config.key_words, config.value_words)):
        size = KEYS * words
        with lanes.when(scalars["block"] * KEYS + KEYS > scalars["length"]):

            def copy(first: Value, rows=rows, words=words, start=start, size=size) -> list[Value]:
                at = lanes.thread * 4 + first
                token = scalars["block"] * KEYS + at // words - scalars["length"]
                with lanes.when((at < size) & (token >= 0) & (token < scalars["count"])):
                    lanes.store(lanes.load(rows, token * words + at % words, I32, 4), slot, at + start)
                return []

            lanes.loop(0, size, 4 * WARPGROUP, copy, [])
        start += size


def _scores(config: Attention, lanes: Lanes, queries: Memory, slot: Memory, mine: Value) -> list[list[Value]]:
    """Products of 16 queries and 2 x 8 keys, as C operands; even and odd steps apart: their chains are half as long."""
    lane = lanes.lane
    query = (mine * ROWS + lane % 16) * config.key_words + lane // 16 * 4
    key = (lane // 16 * 8 + lane % 8) * config.key_words + lane // 8 % 2 * 4
    steps = padded(config.head_dim, ROWS) // ROWS
    sums = [[[lanes.value(0.0, "f32")] * 4 for _ in range(2)] for _ in range(min(2, steps))]
    for step in range(steps):
        a, b = (lanes.load_matrices(memory, at, step * 8) for memory, at in ((queries, query), (slot, key)))
        own = sums[step % 2]
        own[:] = [lanes.mma(a, b[2 * n : 2 * n + 2], own[n]) for n in range(2)]
    scale = LOG2_E * config.head_dim**-0.5
    totals = sums[0] if steps == 1 else [[x + y for x, y in zip(*pair)] for pair in zip(*sums)]
    return [[number * scale for number in total] for total in totals]


def _visible(config: Attention, lanes: Lanes, scalars: Scalars, mine: Value) -> list[list[Value]]:
    """Which of the keys a query sees, as the C operands of `_scores`."""
    row = (scalars["first_tile"] + mine) * ROWS + lanes.lane // 4
    key = scalars["block"] * KEYS + lanes.lane % 4 * 2
    distances = [scalars["length"] + (row + 8 * r) // config.group - key for r in range(2)]

    def sees(n: int, i: int) -> Value:
        distance = distances[i // 2] - (8 * n + i % 2)
        return distance >= 0 if config.window is None else (distance >= 0) & (distance < config.window)

    return [[sees(n, i) for i in range(4)] for n in range(2)]


def _update(config, lanes: Lanes, slot: Memory, first_col: Value, scores, visible, state) -> list[Value]:
    """The state after 16 keys more."""
    tops, sums, out, scales = list(state[:2]), list(state[2:4]), list(state[4:]), []
    masked, zero = lanes.value(MASKED, "f32"), lanes.value(0.0, "f32")
    for r in range(2):
        own = [(n, i) for n in range(2) for i in (2 * r, 2 * r + 1)]
        top = tops[r]
        for n, i in own:
            top = lanes.larger(top, lanes.select(visible[n][i], scores[n][i], masked))
        for by in (1, 2):
            top = lanes.larger(top, lanes.shuffle(top, by))
        scales.append(lanes.exp2(tops[r] - top))
        tops[r], sums[r] = top, sums[r] * scales[r]
        for n, i in own:
            scores[n][i] = lanes.select(visible[n][i], lanes.exp2(scores[n][i] - top), zero)
            sums[r] = sums[r] + scores[n][i]
    p = [lanes.pack(scores[n][2 * r], scores[n][2 * r + 1]) for n in range(2) for r in range(2)]
    value = lanes.lane % 16 * config.value_words + (lanes.lane // 16 * 4 + KEYS * config.key_words) + first_col // 2
    for col in range(0, config.warp_cols, 16):
        b = lanes.load_matrices(slot, value, col // 2, transposed=True)
        for n in range(2):
            own = slice(col // 2 + 4 * n, col // 2 + 4 * n + 4)
            out[own] = lanes.mma(p, b[2 * n : 2 * n + 2], [x * scales[i // 2] for i, x in enumerate(out[own])])
    return [*tops, *sums, *out]


def store_part(config: Attention) -> Callable[..., list[Value]]:
    """The state of each tile to its 16 rows of a buffer of parts, f32 [rows, part_stride]; returns the state.

    In global memory on global layers; in shared memory on sliding ones, where the warpgroups are the parts.
    Scalars: first, tiles as for `attend_block`; base, the row of the first query of tile 0 in this part.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: Scalars, state: list[Value]) -> list[Value]:
        (parts,) = memories
        quad, (mine, part, is_real) = lanes.lane % 4, _work(config, lanes, scalars)
        with lanes.when(is_real):
            for r in range(2):
                row = scalars["base"] + mine * ROWS + (lanes.lane // 4 + 8 * r)
                at = row * config.part_stride
                for n in range(config.warp_cols // 8):
                    pair = 4 + 4 * n + 2 * r
                    lanes.store(state[pair : pair + 2], parts, at + part * config.warp_cols + quad * 2 + 8 * n)
                total = lanes.sum_over(state[2 + r], 4)
                with lanes.when(quad.equals(0) & part.equals(0)):
                    lanes.store([state[r], total], parts, at + config.value_cols)
        return state

    return tile


def merge(config: Attention, ways: int) -> Callable[..., None]:
    """Attention from its parts, as bf16 where the next product's inputs are: V columns of each head.

    Four columns of a query are the work of `ways` threads, which take parts in turn and are then merged two by two: an
    order that only the parts' numbers set. 1 for the four parts of a sliding layer, 16 for a global layer's.
    Memories: parts; sinks f32 if there are any; what is written. Scalars: team; head; `rows` queries from first_row on;
    base (the row of the first one in part 0), step (rows from part to part), parts; sink (where this head's are).
    """
    width = WARP // ways  # quads of columns that a warp has at a time

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: Scalars) -> None:
        quads = scalars["rows"] * (config.value_cols // 4)
        warp = scalars["team"] * (WARPGROUP // WARP) + lanes.warp

        def step(first: Value) -> list[Value]:
            quad = first + warp * width + lanes.lane % width
            is_real, quad = quad < quads, quad.minimum(quads - 1)
            row, col = quad // (config.value_cols // 4), quad % (config.value_cols // 4) * 4
            found = _merged(config, lanes, memories[0], scalars, (scalars["base"] + row, col), ways)
            query = scalars["first_row"] + row
            if config.has_sink:
                sink = lanes.load_one(memories[1], scalars["sink"] + query % config.group)
                found = _joined(lanes, found, [sink * LOG2_E, lanes.value(1.0, "f32")])
            inverse = lanes.reciprocal(found[1].maximum(1e-30))  # no key at all: zero, not NaN
            head = scalars["head"] * config.group + query % config.group
            at = config.attended.place(query // config.group, head * config.value_dim + col)
            is_mine = is_real & (lanes.lane < width) & (query < config.query_rows)
            for i in range(2):
                with lanes.when(is_mine & (col + 2 * i < config.value_dim)):
                    low, high = (number * inverse for number in found[2 + 2 * i : 4 + 2 * i])
                    lanes.store([lanes.pack(low, high)], memories[-1], at + i)
            return []

        lanes.loop(0, quads, CONSUMER_THREADS // ways, step, [])

    return tile


def _merged(config, lanes: Lanes, parts: Memory, scalars: Scalars, place: tuple[Value, Value], ways: int):
    """Maximum, sum and four weighted values of a query over all parts."""
    neutral = [lanes.value(number, "f32") for number in (MASKED, *[0.0] * 5)]
    row, col = place

    def load(part: Value) -> list[Value]:
        is_real, part = part < scalars["parts"], part.minimum(scalars["parts"] - 1)
        at = (row + part * scalars["step"]) * config.part_stride
        found = lanes.load(parts, at + config.value_cols, count=2) + lanes.load(parts, at + col, count=4)
        return [lanes.select(is_real, number, other) for number, other in zip(found, neutral)]

    def visit(first: Value, *before: Value) -> list[Value]:
        total = list(before)
        for found in [load(first + lanes.lane // (WARP // ways) + i * ways) for i in range(PARTS_AHEAD)]:
            total = _joined(lanes, total, found)
        return total

    total, by = lanes.loop(0, scalars["parts"], PARTS_AHEAD * ways, visit, neutral), WARP // ways
    while by < WARP:
        total = _joined(lanes, total, [lanes.shuffle(number, by) for number in total])
        by *= 2
    return total


def _joined(lanes: Lanes, a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
    """Of two parts (maximum, sum, weighted values; a sink has none), the same bits either way round."""
    top = lanes.larger(a[0], b[0])
    scale_a, scale_b = (lanes.exp2(part[0] - top) for part in (a, b))
    both = [x * scale_a + y * scale_b for x, y in zip(a[1:], b[1:])]
    return [top, *both, *(x * scale_a for x in a[len(b) :])]
