"""What attention reads beside the cached keys: rotated queries, and new tokens' keys and values, also for the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from pallas_kernels.decode_step.hopper.attention import AHEAD, KEYS, Attention, Scalars
from pallas_kernels.decode_step.hopper.config import CONSUMER_THREADS, ROWS
from pallas_kernels.lanes import WARPGROUP, Lanes, Memory, Value
from pallas_kernels.lanes.values import I32


def prepare(config: Attention) -> Callable[..., None]:
    """Rotated queries of some tiles, and rotated keys and scaled values of all new tokens, of key head `head`.

    Memories: qkv f32 [T, qkv_stride]; table f32 [2, positions, rotary / 2], cos and sin; and, written, in words of two
    bf16: queries [16 tiles, key_words], keys [T, key_words], values [T, value_words]. Scalars: team, head, first_tile,
    tiles; length, the first token's position.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: Scalars) -> None:
        qkv, table, queries, keys, values = memories
        together, count = words_together(config), scalars["tiles"] * ROWS
        groups = max(config.key_words, config.value_words) // together
        key_row, value_row = count, count + config.tokens

        def find(item: Value) -> list[Value]:
            row, word = item // groups, item % groups * together
            source = _source(config, lanes, scalars, row)
            return _words(config, lanes, (qkv, table), scalars["length"], source, word)

        def keep(found: Sequence[Value], item: Value) -> None:
            row, word = item // groups, item % groups * together
            for memory, first, last, words in (
                (queries, 0, key_row, config.key_words),
                (keys, key_row, value_row, config.key_words),
                (values, value_row, value_row + config.tokens, config.value_words),
            ):
                with lanes.when((row >= first) & (row < last) & (word < words)):
                    lanes.store(found, memory, (row - first) * words + word)

        _deal(lanes, scalars["team"], (count + 2 * config.tokens) * groups, find, keep)

    return tile


def words_together(config: Attention) -> int:
    """Of a row, that a thread prepares at a time: all rotated or none, all inside of the row or none."""
    sizes = config.head_dim, config.value_dim, config.rotary // 2, config.qkv_stride
    return next(words for words in (4, 2, 1) if all(size % (2 * words) == 0 for size in sizes) or words == 1)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Of a row that is prepared: a query's, a key's, or values."""

    start: Value  # its place in QKV
    token: Value
    is_real: Value  # not one of those that fill the last tile
    is_value: Value


def _source(config: Attention, lanes: Lanes, scalars: Scalars, row: Value) -> _Source:
    """Rows are first queries, then the tokens' keys, then their values."""
    new = row - scalars["tiles"] * ROWS
    is_query, is_value = new < 0, new >= config.tokens
    query = scalars["first_tile"] * ROWS + row
    is_real = lanes.select(is_query, query, lanes.value(0, I32)) < config.query_rows
    query = query.minimum(config.query_rows - 1)
    token = lanes.select(is_query, query // config.group, lanes.select(is_value, new - config.tokens, new))
    heads, kv_heads = config.heads // config.chunks, config.kv_heads // config.chunks
    chunk, head = scalars["head"] // kv_heads, scalars["head"] % kv_heads
    of_query = (head * config.group + query % config.group) * config.head_dim
    of_key = (head + heads) * config.head_dim
    of_value = head * config.value_dim + (heads + kv_heads) * config.head_dim
    of_row = lanes.select(is_query, of_query, lanes.select(is_value, of_value, of_key))
    chunk_rows = (heads + kv_heads) * config.head_dim + kv_heads * config.value_dim
    return _Source(token * config.qkv_stride + chunk * chunk_rows + of_row, token, is_real, is_value)


def _words(
    config: Attention, lanes: Lanes, memories: Sequence[Memory], length: Value, source: _Source, word: Value
) -> list[Value]:
    """Numbers from 2 `word` on of a row; zeros after its end."""
    qkv, table = memories
    half, dim, numbers = config.rotary // 2, word * 2, 2 * words_together(config)
    zero, rotary = (lanes.value(number, I32) for number in (0, config.rotary))
    is_rotated, is_first = dim < lanes.select(source.is_value, zero, rotary), dim < half
    width = lanes.select(source.is_value, lanes.value(config.value_dim, I32), lanes.value(config.head_dim, I32))
    is_inside, dim = source.is_real & (dim < width), dim.minimum(width - numbers)
    angle = lanes.select(is_first, dim, dim - half)
    partner = lanes.select(is_rotated, lanes.select(is_first, dim + half, angle), dim)
    own, other = (_numbers(lanes, qkv, source.start + at, numbers) for at in (dim, partner))
    position = (length + source.token).minimum(config.positions - 1)  # padding may go beyond the end
    angle = position * half + lanes.select(is_rotated, angle, zero)
    cos, sin = (_numbers(lanes, table, angle + start, numbers) for start in (0, config.positions * half))
    sign = lanes.select(is_first, lanes.value(-1.0, "f32"), lanes.value(1.0, "f32"))
    scale = lanes.select(source.is_value, lanes.value(config.value_scale, "f32"), lanes.value(1.0, "f32"))
    rotated = [own[i] * cos[i] + sign * (other[i] * sin[i]) for i in range(numbers)]
    found = [lanes.select(is_rotated, new, old * scale) for new, old in zip(rotated, own)]
    found = [lanes.select(is_inside, number, lanes.value(0.0, "f32")) for number in found]
    return [lanes.pack(low, high) for low, high in zip(found[::2], found[1::2])]


def _numbers(lanes: Lanes, memory: Memory, index: Value, count: int) -> list[Value]:
    """So many neighbours, at most four at a time."""
    return [number for at in range(0, count, 4) for number in lanes.load(memory, index + at, count=min(4, count))]


def _deal(lanes: Lanes, team: Value, items: Value, find: Callable[..., list[Value]], keep: Callable[..., None]) -> None:
    """Each item to a thread of the CTA: `keep(find(item), item)`, where the loads of several come before a store."""
    thread = team * WARPGROUP + lanes.thread

    def step(first: Value) -> list[Value]:
        mine = [first + thread + i * CONSUMER_THREADS for i in range(AHEAD)]
        found = [find(item.minimum(items - 1)) for item in mine]
        for item, values in zip(mine, found):
            with lanes.when(item < items):
                keep(values, item)
        return []

    lanes.loop(0, items, AHEAD * CONSUMER_THREADS, step, [])


def write_cache(config: Attention) -> Callable[..., None]:
    """The first `count` new tokens' rows into the cache, as they are.

    Memories: keys, values as `prepare` left them; the cache in global memory, words [layers * K * S/16, slot_words]: a
    block of 16 rows is what a slot holds. Scalars: team, layer (among those of its kind), head, length, count.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: Scalars) -> None:
        *new, cache = memories
        head = (scalars["layer"] * config.kv_heads + scalars["head"]) * (config.cache_rows // KEYS)
        for rows, words, start in zip(new, (config.key_words, config.value_words), (0, KEYS * config.key_words)):

            def find(item: Value, rows: Memory = rows) -> list[Value]:
                return lanes.load(rows, item * 4, I32, 4)

            def keep(found: Sequence[Value], item: Value, words: int = words, start: int = start) -> None:
                token, word = item * 4 // words, item * 4 % words
                row = (scalars["length"] + token) % config.cache_rows
                block = (head + row // KEYS) * config.slot_words
                lanes.store(found, cache, block + row % KEYS * words + start + word)

            _deal(lanes, scalars["team"], scalars["count"] * (words // 4), find, keep)

    return tile
