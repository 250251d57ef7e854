"""The Hopper kernel's attention against float64, by emulation."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from mimo_jax.modeling.layers import rotary_table
from pallas_kernels.decode_step.hopper import attention, attention_inputs
from pallas_kernels.decode_step.hopper.attention import KEYS, Attention
from pallas_kernels.decode_step.hopper.config import (
    COLUMN_UNIT,
    CONSUMERS,
    PAGE_GAP,
    ROWS,
    SLOT_WORDS,
    Columns,
    Inputs,
    padded,
)
from pallas_kernels.lanes import emulated

BF16 = ml_dtypes.bfloat16
LAYERS, LAYER = 2, 1
pytestmark = pytest.mark.usefixtures("unchecked")  # a tile is many thousand calls
THETA = 10_000.0
SPARE = 8  # floats of a token's QKV that nobody reads
JUNK = 300.0  # what rows of a cache hold that nobody has written: a key that a query must not see would show


def sizes(tokens: int, window: int | None = None, **changes) -> Attention:
    """Of the small models: heads that are no multiple of 16 wide."""
    found: dict = dict(heads=4, kv_heads=2, chunks=1, head_dim=36, value_dim=24, rotary=12)
    found |= dict(cache_rows=96 if window is None else 48, window=window, value_scale=0.6, has_sink=True) | changes
    attended = Inputs(Columns(padded(found["heads"] * found["value_dim"], COLUMN_UNIT), 1), tokens)
    config = Attention(tokens=tokens, **found, positions=120, qkv_stride=0, attended=attended)
    rows = config.heads * config.head_dim + config.kv_heads * (config.head_dim + config.value_dim)
    return dataclasses.replace(config, qkv_stride=rows + SPARE)


class Sequence:
    """Numbers of every position, and a cache into which `step` reads them."""

    def __init__(self, config: Attention, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.qkv = random.normal(size=(config.cache_rows * 3, config.qkv_stride)).astype(np.float32)
        self.sinks = random.normal(size=config.heads).astype(np.float32)
        blocks = config.cache_rows // KEYS
        self.cache = np.full((LAYERS, config.kv_heads, blocks, 2 * config.slot_words), JUNK, BF16).view(np.int32)

    def rows(self, config: Attention) -> list[np.ndarray]:
        """Keys and values as the cache has them: [layers, heads, cache_rows, dim and what keeps banks apart]."""
        pieces = np.split(self.cache, [KEYS * config.key_words], axis=-1)
        shape = LAYERS, config.kv_heads, config.cache_rows, -1
        return [np.ascontiguousarray(piece).view(BF16).astype(np.float64).reshape(shape) for piece in pieces]

    def run(self, config: Attention, head: int, length: int, count: int, padding: float = 1.0) -> "Run":
        qkv = np.full((config.tokens, config.qkv_stride), padding, np.float32)
        qkv[:count] = self.qkv[length : length + count]
        return Run(config, self, qkv, head, length, count)

    def write(self, config: Attention, length: int, count: int) -> None:
        for head in range(config.kv_heads):
            run = self.run(config, head, length, count)
            run.write(run.prepare(0, 1)[1:])

    def step(self, config: Attention, length: int, count: int, parts: int = 3, write_first=False, padding=1.0):
        """Words of `count` tokens after `length`, whose rows are in the cache afterwards."""
        out = np.full(config.attended.words, -1, np.int32)
        attend = attend_globally if config.window is None else attend_in_window
        for head in range(config.kv_heads):
            run = self.run(config, head, length, count, padding)
            new = run.prepare(0, 1)[1:]
            if write_first:
                run.write(new)
            attend(run, out, parts)
            if not write_first:
                run.write(new)
        pages = out.reshape(config.attended.columns.parts, config.tokens, -1)
        assert (pages[:, :, -PAGE_GAP:] == -1).all()
        return pages[:, :count, :-PAGE_GAP].swapaxes(0, 1).reshape(count, -1)


@dataclasses.dataclass
class Run:
    """What the CTAs of one key head do."""

    config: Attention
    sequence: Sequence
    qkv: np.ndarray
    head: int
    length: int
    count: int

    def prepare(self, first_tile: int, tiles: int) -> list[np.ndarray]:
        config = self.config
        table = np.stack(rotary_table(np.arange(config.positions), config.rotary, THETA, np.float32))
        rows = (tiles * ROWS, config.key_words), (config.tokens, config.key_words), (config.tokens, config.value_words)
        found = [np.full(shape, -1, np.int32) for shape in rows]
        for team in range(CONSUMERS):
            scalars = dict(team=team, head=self.head, first_tile=first_tile, tiles=tiles, length=self.length)
            emulated.run(attention_inputs.prepare(config), [self.qkv, table, *found], scalars)
        return found

    def write(self, new: list[np.ndarray]) -> None:
        for team in range(CONSUMERS):
            scalars = dict(team=team, layer=LAYER, head=self.head, length=self.length, count=self.count)
            emulated.run(attention_inputs.write_cache(self.config), [*new, self.sequence.cache], scalars)

    def attend(self, held: list[np.ndarray], part: int, parts: int, **scalars: int) -> list:
        """The state of one warpgroup after a part's blocks."""
        config, state = self.config, self.config.first_state()
        first, blocks = map(int, attention.blocks_of(config, self.length, self.count, part, parts))
        for block in range(first, first + blocks * parts, parts):
            scalars |= dict(block=block, length=self.length, count=self.count)
            lanes = emulated.Emulated(counts_conflicts=True)
            arrays = [*held, self.load(block)]
            lanes = emulated.run(attention.attend_block(config), arrays, scalars, lanes, state)
            assert lanes.conflicts == 0
            state = lanes.state
        return state

    def load(self, block: int) -> np.ndarray:
        """What a role warp copies into a slot."""
        return self.sequence.cache[LAYER, self.head, int(attention.place_of(self.config, block))].copy()

    def store(self, buffer: np.ndarray, state: list, **scalars: int) -> None:
        emulated.run(attention.store_part(self.config), [buffer], scalars, state=state)

    def merge(self, buffer: np.ndarray, out: np.ndarray, ways: int, **scalars: int) -> None:
        sinks = [self.sequence.sinks] if self.config.has_sink else []
        scalars |= dict(head=self.head, sink=self.head * self.config.group)
        for team in range(CONSUMERS):
            tile = attention.merge(self.config, ways)
            emulated.run(tile, [buffer, *sinks, out], dict(team=team, **scalars))


def attend_globally(run: Run, out: np.ndarray, parts: int) -> None:
    """A CTA for each part, with all queries of the head; each warpgroup has four tiles."""
    tiles, rows = run.config.tiles, run.config.tiles * ROWS
    buffer = np.full((parts * rows, run.config.part_stride), np.nan, np.float32)
    held = run.prepare(0, tiles)
    for part in range(parts):
        for first in range(0, tiles * run.config.split, 4):
            state = run.attend(held, part, parts, first=first, tiles=tiles, first_tile=0)
            run.store(buffer, state, first=first, tiles=tiles, base=part * rows)
    run.merge(buffer, out, 16, first_row=0, rows=run.config.query_rows, base=0, step=rows, parts=parts)


def attend_in_window(run: Run, out: np.ndarray, parts: int) -> None:
    """A CTA for each tile; its warpgroups are the parts, four."""
    for tile in range(run.config.tiles):
        held = run.prepare(tile, 1)
        buffer = np.full((parts * ROWS, run.config.part_stride), np.nan, np.float32)
        for team in range(parts):
            first = -team if run.config.split == 1 else 0
            state = run.attend(held, team, parts, first=first, tiles=1, first_tile=tile)
            run.store(buffer, state, first=first, tiles=1, base=team * ROWS)
        run.merge(buffer, out, 1, first_row=tile * ROWS, rows=ROWS, base=0, step=ROWS, parts=parts)


def heads_of(config: Attention, qkv: np.ndarray, first: int) -> list[np.ndarray]:
    """Rotated queries and keys and scaled values [tokens, heads, dim] of tokens from a position on, rounded to bf16.

    The rotation is a multiplication of complex numbers.
    """
    chunks, rows = config.chunks, config.qkv_stride - SPARE
    counts = config.heads // chunks, config.kv_heads // chunks, config.kv_heads // chunks
    dims = config.head_dim, config.head_dim, config.value_dim
    ends = np.cumsum([count * dim for count, dim in zip(counts, dims)])
    pieces = np.split(qkv[:, :rows].astype(np.float64).reshape(len(qkv), chunks, -1), ends[:-1], axis=-1)
    q, k, v = (piece.reshape(len(qkv), -1, dim) for piece, dim in zip(pieces, dims))
    half = config.rotary // 2
    turns = np.exp(1j * np.outer(first + np.arange(len(qkv)), THETA ** (-np.arange(half) / half)))[:, None]
    for x in (q, k):
        turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * turns
        x[..., :half], x[..., half : 2 * half] = turned.real, turned.imag
    return [x.astype(BF16).astype(np.float64) for x in (q, k, v * config.value_scale)]


def expected(config: Attention, sequence: Sequence, length: int, count: int) -> np.ndarray:
    """Softmax in float64: [count, heads, value_dim]."""
    q, k, v = heads_of(config, sequence.qkv[: length + count], 0)
    k, v = (np.repeat(x, config.group, axis=1) for x in (k, v))
    out = np.zeros((count, config.heads, config.value_dim))
    for token in range(count):
        last = length + token + 1
        first = 0 if config.window is None else max(0, last - config.window)
        scores = np.einsum("hq,shq->hs", q[last - 1], k[first:last]) / np.sqrt(config.head_dim)
        sinks = sequence.sinks[:, None] if config.has_sink else np.full((config.heads, 1), -np.inf)
        exponentials = np.exp(np.concatenate([scores, sinks], axis=1))
        weights = exponentials[:, :-1] / exponentials.sum(axis=1, keepdims=True)
        out[token] = np.einsum("hs,shv->hv", weights, v[first:last])
    return out


def numbers(config: Attention, words: np.ndarray) -> np.ndarray:
    """What was written, as [tokens, heads, value_dim]; the words after a token's were left alone."""
    used = config.heads * config.value_dim // 2
    assert (words[:, used:] == -1).all()
    found = np.ascontiguousarray(words[:, :used]).view(BF16).astype(np.float64)
    return found.reshape(len(words), config.heads, config.value_dim)


def read(config: Attention, sequence: Sequence, length: int) -> None:
    """The first `length` tokens into the cache, a block at a time."""
    config = dataclasses.replace(config, tokens=16)
    for first in range(0, length, 16):
        sequence.write(config, first, min(16, length - first))


GLOBAL = [
    (sizes(1), 0, 1, 1),
    (sizes(4), 0, 3, 3),
    (sizes(8), 29, 8, 3),
    (sizes(16), 64, 16, 5),
    (sizes(16), 80, 16, 1),
    (sizes(8, heads=2), 13, 7, 3),
    (sizes(8, chunks=2), 21, 8, 3),
    (sizes(16, heads=16, has_sink=False), 33, 11, 5),
    (sizes(8, heads=16, kv_heads=1, head_dim=192, value_dim=128, rotary=64), 32, 8, 3),
]
SLIDING = [
    (sizes(1, window=20), 0, 1, 4),
    (sizes(4, window=20), 0, 4, 4),
    (sizes(8, window=20), 61, 8, 4),
    (sizes(16, window=20), 96, 16, 4),
    (sizes(16, window=33, heads=2, chunks=2, has_sink=False), 77, 13, 4),
    (sizes(8, window=20, heads=16, kv_heads=1, head_dim=192, value_dim=128, rotary=64), 45, 8, 4),
]


@pytest.mark.parametrize(("config", "length", "count", "parts"), GLOBAL + SLIDING)
def test_attention_is_softmax_in_float64(config, length, count, parts):
    """What each token of a block after many gets is what float64 gives it from bf16 rows."""
    sequence = Sequence(config)
    read(config, sequence, length)
    found = numbers(config, sequence.step(config, length, count, parts))
    want = expected(config, sequence, length, count)
    assert np.abs(found - want).max() < 5e-3 * np.abs(want).max()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("length", [0, 27])
def test_a_token_has_the_same_bits_alone_and_in_a_block(window, length):
    """Eight tokens at once, in blocks of three and five, and one by one: three programs, the same words."""
    configs = [sizes(tokens, window=window, heads=3, kv_heads=1) for tokens in (16, 8, 1)]
    found = []
    for config, blocks in zip(configs, ([8], [3, 5], [1] * 8)):
        sequence, first, words = Sequence(config), length, []
        read(config, sequence, length)
        for count in blocks:
            words.append(sequence.step(config, first, count))
            first += count
        found.append((np.concatenate(words), sequence.cache))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("option", "value"), [("write_first", True), ("padding", np.nan)])
def test_bits_do_not_depend_on(option, value, window):
    """Whether the cache has the new rows already, and what tokens hold that are padding, in a block of keys too."""
    config = sizes(8, window=window, heads=2, kv_heads=1)
    found = []
    for options in ({}, {option: value}):
        sequence = Sequence(config)
        read(config, sequence, 43)
        found.append((sequence.step(config, 43, 3, **options), sequence.cache))
    for a, b in zip(*found):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("window", [None, 20])
def test_the_cache_holds_new_rows_and_nothing_else(window):
    """Rotated keys and scaled values where their position belongs, zeros after them; other rows keep what they had."""
    config = sizes(8, window=window)
    sequence = Sequence(config)
    length, count = 45, 6
    sequence.step(config, length, count)
    _, *rows = heads_of(config, sequence.qkv[length : length + count], length)
    own = [(length + token) % config.cache_rows for token in range(count)]
    for found, want, dim in zip(sequence.rows(config), rows, (config.head_dim, config.value_dim)):
        np.testing.assert_allclose(found[LAYER][:, own, :dim], want.transpose(1, 0, 2), rtol=2**-7, atol=1e-6)
        assert (found[LAYER][:, own, dim:] == 0).all()
        found[LAYER][:, own] = JUNK
        assert (found == JUNK).all()


def test_a_block_that_no_query_sees_changes_no_bit():
    """Neither the state before the first key nor one with sums: keys of the future, and keys that left the window."""
    config = sizes(8, window=20)
    sequence = Sequence(config)
    read(config, sequence, 40)
    run = Run(config, sequence, sequence.qkv[40:48], 0, 40, 8)
    held, tile = run.prepare(0, 1), attention.attend_block(config)
    common = dict(first=0, tiles=1, first_tile=0, length=40, count=8)
    state = np.repeat(np.array(config.first_state(), np.float32)[:, None], 128, axis=1)

    def after(block: int) -> np.ndarray:
        lanes = emulated.run(tile, [*held, run.load(block)], dict(block=block, **common), state=list(state))
        return np.stack(lanes.state).view(np.int32)

    for seen in (1, 2):
        for unseen in (0, 3, 4):
            np.testing.assert_array_equal(after(unseen), state.view(np.int32))
        assert (after(seen) != state.view(np.int32)).any()
        state = after(seen).view(np.float32)


def test_parts_without_keys_are_neutral():
    """Twelve keys dealt to one part or to five, of which four have none; and no key in any part gives zero, not NaN."""
    config = sizes(8)
    found = [Sequence(config).step(config, 4, 8, parts) for parts in (1, 5)]
    np.testing.assert_array_equal(*found)
    sequence = Sequence(config)
    buffer = np.zeros((2 * ROWS, config.part_stride), np.float32)
    out = np.full(config.attended.words, -1, np.int32)
    run = Run(dataclasses.replace(config, has_sink=False), sequence, sequence.qkv, 0, 0, 1)
    for part in range(2):
        run.store(buffer, config.first_state(), first=0, tiles=1, base=part * ROWS)
    run.merge(buffer, out, 16, first_row=0, rows=ROWS, base=0, step=ROWS, parts=2)
    assert (out.reshape(config.tokens, -1)[:, : config.group * config.value_dim // 2] == 0).all()


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("window", [None, 20])
def test_warps_may_share_a_tile(window, split):
    """Each with its columns of the values: the same bits."""
    found = []
    for ways in (1, split):
        config = sizes(8, window=window, value_dim=64, split=ways)
        sequence = Sequence(config)
        read(config, sequence, 43)
        found.append(sequence.step(config, 43, 8, parts=3 if window is None else 4))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("window", [None, 1, 20, 128])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_blocks_are_those_that_a_query_sees(window, parts):
    """Each block with a visible position belongs to exactly one part, no other block to any."""
    config = sizes(16, window=window)
    for length in (0, 15, 16, 127, 2000):
        for count in (1, 16):
            found = []
            for part in range(parts):
                first, blocks = map(int, attention.blocks_of(config, length, count, part, parts))
                mine = range(first, first + blocks * parts, parts)
                assert blocks >= 0 and all(block % parts == part for block in mine)
                found += mine
            oldest = 0 if window is None else max(0, length - window + 1)
            assert sorted(found) == sorted({position // KEYS for position in range(oldest, length + count)})


def test_a_block_of_pro_fits_into_a_slot():
    """Keys of 192 and values of 128 numbers, with what keeps their banks apart."""
    config = sizes(8, heads=16, kv_heads=1, head_dim=192, value_dim=128)
    assert config.slot_words <= SLOT_WORDS
    for words in (config.key_words, config.value_words):
        assert words % 8 == 4  # so eight rows' 16 bytes are in 32 banks
