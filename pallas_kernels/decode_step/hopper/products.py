"""Matrix products of a warpgroup: a slot's weights times a page's inputs, and what becomes of an item's sums.

Weights are the M operand of `mma.m16n8k16` (16 rows), tokens the N operand (8 or 16); `weights` tells their order.
No sum depends on the number of tokens, on what other tokens hold, or on which CTA forms it: within a chunk each warp
adds up its quarter of the columns, the four warps' parts are added in their order, and chunks in theirs.

An item's sums, like the warps' parts, lie as the instruction leaves them: see `place`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.decode_step.hopper.config import (
    CONSUMER_THREADS,
    CONSUMERS,
    FP8_SEGMENT,
    INPUT_SHIFT,
    LOG2_E,
    PAGE_GAP,
    ROWS,
    SUM_STRIDE,
    WARPS,
    Down,
    Inputs,
    Matrix,
    code_words,
)
from pallas_kernels.expert_matmul import hopper_layout
from pallas_kernels.expert_matmul.hopper_layout import STEP
from pallas_kernels.expert_matmul.mosaic_tile import CODE_BITS, LAST_BITS, decode_text, scale_pair_text
from pallas_kernels.lanes import WARPGROUP, Lanes, Memory, Value
from pallas_kernels.lanes.values import F32, I32

Tile = Callable[[Lanes, Sequence[Memory], dict[str, Value]], None]
Sums = list[list[Value]]  # a thread's four sums of each eight tokens
TOKENS = 8  # N of the instruction
BLOCK = 32  # columns whose operands a thread has side by side: of two instructions
FRAGMENT = ROWS * TOKENS  # sums of one instruction
OWN_COLUMNS = 3 * ROWS  # of the residual, at most those of one CTA

_DECODE_MXFP4 = decode_text("$4", "$5", ("$0", "$1", "$2", "$3"))
_DECODE_FP8 = """{
.reg .b16 lo, hi;
mov.b32 {lo, hi}, $2;
cvt.rn.f16x2.e4m3x2 $0, lo;
cvt.rn.f16x2.e4m3x2 $1, hi;
}"""


def multiply_chunk(matrix: Matrix, tokens: int) -> Tile:
    """Adds a slot's row block, times the inputs of its chunk, to an item's sums.

    Memories: slot int32 [slot_words]; page int32, a token's part every part_cols/2 + PAGE_GAP words, inputs bf16, or
    float16 times 2**-INPUT_SHIFT if the matrix is FP8; sums float32 [items, tokens * SUM_STRIDE]; scratch float32
    [4 * tokens * SUM_STRIDE] of the warpgroup. Scalars: item; first, the page's word with the chunk's first column of
    token 0; is_first, 1 if the sums begin with this chunk. When it returns, all warps have read slot and page.
    """
    token_words = Inputs(matrix.columns, tokens).token_words

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        slot, page, sums, scratch = memories
        row, quad = lanes.lane // 4, lanes.lane % 4
        inputs = scalars["first"] + lanes.warp * (matrix.warp_cols // 2) + row * token_words + quad * 4
        groups = [inputs + first * token_words for first in range(0, tokens, TOKENS)]
        codes = lanes.warp * matrix.tile_words + lanes.lane * 4
        scales = lanes.warp * matrix.tile_words + (row * 2 + code_words(matrix.format, matrix.warp_cols))
        operands = _Operands(lanes, matrix.warp_cols, slot, codes, scales, page, groups)
        products = _PRODUCTS[matrix.format](operands)
        _add_up(lanes, products, sums, scratch, scalars["item"], scalars["is_first"])

    return tile


def add_teams(tokens: int, ways: int, items: int) -> Tile:
    """An item's sums of several warpgroups, to the place of warpgroup 0's; each thread adds what no other one reads.

    Memories: sums float32 [4, items, tokens * SUM_STRIDE]. Scalars: item; team, which had the item's first chunk. The
    `ways` teams from that one on are added in their order, so a sum does not tell which warpgroups formed its parts.
    """
    count, size = tokens // TOKENS, tokens * SUM_STRIDE

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        (sums,) = memories
        own = scalars["item"] * size + lanes.thread * count
        teams = [(scalars["team"] + way) % CONSUMERS for way in range(ways)]
        parts = [lanes.load(sums, own + team * (items * size), F32, count) for team in teams]
        lanes.store([summed(column) for column in zip(*parts)], sums, own)

    return tile


def store_rows(rows: int, tokens: int, has_factors: bool) -> Tile:
    """A row block of a product, times the tokens' factors, if there are any.

    Memories: sums; out float32 [tokens, rows]; factors float32 [tokens], if any. Scalars: item, block.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        sums, out, *factors = memories
        for token, row, value in _each_sum(lanes, sums, scalars["item"], tokens):
            column = scalars["block"] * ROWS + row
            scaled = value * lanes.load_one(factors[0], token) if has_factors else value
            with lanes.when(column < rows):
                lanes.store([scaled], out, token * rows + column)

    return tile


def store_own(columns: int, tokens: int) -> Tile:
    """Memories: sums; own float32 [tokens, columns]. Scalars: item, whose rows become columns 16 * item and on."""

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        sums, own = memories
        for token, row, value in _each_sum(lanes, sums, scalars["item"], tokens):
            lanes.store([value], own, token * columns + scalars["item"] * ROWS + row)

    return tile


def store_activated(place_of: Callable[[Value, Value], Value], tokens: int, kind: str, is_routed: bool) -> Tile:
    """silu(gate) * up of a row block of gate and up, which alternate by eights: eight features.

    Memories: sums; hidden int32, two features a word, at `place_of(row, feature)`; factors float32 [tokens], of gate
    and up; pairs int32 [units * tokens], if routed. A token's row is its own number, or its pair's, -1 for none. `kind`
    is what the next product reads: "bf16", or "f16", then times 2**-INPUT_SHIFT. Scalars: item, block; unit, if routed.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        sums, hidden, factors, *pairs = memories
        lanes.barrier()
        token, word = lanes.thread // 4, lanes.thread % 4
        with lanes.when(token < tokens):
            row = lanes.load_one(pairs[0], scalars["unit"] * tokens + token, I32) if is_routed else token
            factor = lanes.load_one(factors, token)
            first = scalars["item"] * (tokens * SUM_STRIDE)
            low, high = (
                _activated(lanes, sums, first, token, word * 2 + feature, factor, kind == "f16") for feature in range(2)
            )
            with lanes.when(row >= 0):
                at = place_of(row, scalars["block"] * 8 + word * 2)
                lanes.store([lanes.pack(low, high, kind)], hidden, at)

    return tile


def multiply_expert_down(down: Down, chosen: int, tokens: int) -> Tile:
    """A slot's experts' row blocks of down times their tokens' hidden rows; a warp has a part of an expert's columns.

    Memories: slot int32 [units, tiles, tile_words], tiles of 16 rows by all features; page int32, a pair's hidden row
    of bf16 every features/2 + PAGE_GAP words; products float32 [splits, pairs, OWN_COLUMNS]; pairs int32
    [experts * tokens], -1 for none. Scalars: number, of the slot; units, of all slots; tiles that there are.
    """
    token_words, cols = down.features // 2 + PAGE_GAP, down.features // down.splits
    size = tokens * chosen * OWN_COLUMNS

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        slot, page, products, pairs = memories
        row, quad = lanes.lane // 4, lanes.lane % 4
        within, part = lanes.warp // down.splits, lanes.warp % down.splits
        unit = scalars["number"] * down.units + within
        with lanes.when((within < down.units) & (unit < scalars["units"])):
            firsts = [unit * tokens + first for first in range(0, tokens, TOKENS)]
            read = [lanes.load_one(pairs, first + row, I32).maximum(0) for first in firsts]
            inputs = [pair * token_words + (part * (cols // 2) + quad * 4) for pair in read]
            codes = within * down.unit_words + (part * (2 * cols) + lanes.lane * 4)
            scales = within * down.unit_words + (part * (cols // 8) + row * 2 + code_words("mxfp4", down.features))
            firsts_of = [number * down.tile_words for number in range(down.tiles)]
            tiles = [_Operands(lanes, cols, slot, codes + at, scales + at, page, inputs) for at in firsts_of]
            for number, found in enumerate(_mxfp4(tiles, chains=1)):
                with lanes.when(scalars["tiles"] > number):
                    for first, sums in zip(firsts, found):
                        written = lanes.load(pairs, first + quad * 2, I32, 2)
                        for index, value in enumerate(sums):
                            pair = written[index % 2]
                            with lanes.when(pair >= 0):
                                column = pair * OWN_COLUMNS + (number * ROWS + row + index // 2 * 8)
                                lanes.store([value], products, part * size + column)

    return tile


def combine(chosen: int, tokens: int, splits: int) -> Tile:
    """A CTA's columns of the experts' output: the token's choices weighed, and added in their order.

    Memories: weights float32 [tokens, chosen], 0 where there is no pair, and then the product may be anything; products
    float32 [splits, tokens * chosen, OWN_COLUMNS], parts to be added; own float32 [tokens, OWN_COLUMNS]. Scalars:
    tiles, of 16 columns, 1 to 3; team, for the four consumers share it, after a barrier for all of them.
    """
    size = tokens * chosen * OWN_COLUMNS

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        weights, products, own = memories
        for first in range(0, tokens * OWN_COLUMNS, CONSUMER_THREADS):
            number = scalars["team"] * WARPGROUP + lanes.thread + first
            token, column = number // OWN_COLUMNS, number % OWN_COLUMNS
            with lanes.when(token < tokens), lanes.when(column < scalars["tiles"] * ROWS):
                total = lanes.constant(0.0, F32)
                for choice in range(chosen):
                    pair = token * chosen + choice
                    weight = lanes.load_one(weights, pair)
                    at = pair * OWN_COLUMNS + column
                    product = summed([lanes.load_one(products, at + part * size) for part in range(splits)])
                    product = lanes.select(weight.equals(0.0), lanes.constant(0.0, F32), product)
                    total = lanes.fma(weight, product, total)
                lanes.store([total], own, number)

    return tile


def place(token: Any, row: Any) -> Any:
    """Where an item's sums have this one: a thread's four side by side, threads in order, eight tokens after eight."""
    thread = row % 8 * 4 + token % TOKENS // 2
    return token // TOKENS * FRAGMENT + thread * 4 + row // 8 * 2 + token % 2


@dataclasses.dataclass(frozen=True)
class _Operands:
    """A warp's `cols` columns of a tile: where slot and page have the thread's first codes, scales and inputs."""

    lanes: Lanes
    cols: int
    slot: Memory
    first_codes: Value
    first_scales: Value
    page: Memory
    tokens: Sequence[Value]  # of each group of eight

    def codes(self, offset: int) -> list[Value]:
        return self.lanes.load(self.slot, self.first_codes + offset, I32, 4)

    def scales(self, step: int, kind: str) -> list[Value]:
        """The two words of rows g and g + 8."""
        return self.lanes.load(self.slot, self.first_scales + step * ROWS, kind, 2)

    def inputs(self, block: int) -> list[list[Value]]:
        """The B operands of a block's two instructions, for each eight tokens."""
        return [self.lanes.load(self.page, token + block * (BLOCK // 2), I32, 4) for token in self.tokens]

    def zeros(self) -> Sums:
        return [[self.lanes.constant(0.0, F32)] * 4 for _ in self.tokens]

    def multiply(self, a: Sequence[Value], inputs: list[list[Value]], which: int, sums: Sums, kind: str) -> Sums:
        """One of a block's two instructions, for each eight tokens."""
        halves = [words[2 * which : 2 * which + 2] for words in inputs]
        return [self.lanes.mma(a, b, c, kind) for b, c in zip(halves, sums)]


def _mxfp4(tiles: Sequence[_Operands], chains: int) -> list[Sums]:
    """Of several tiles with the same inputs. One chain of instructions would wait for its own latency."""
    lanes = tiles[0].lanes
    sums = [[operands.zeros() for _ in range(chains)] for operands in tiles]
    for step in range(tiles[0].cols // STEP):
        stored = [operands.scales(step, I32) for operands in tiles]
        words = [operands.codes(step * 256) + operands.codes(step * 256 + 128) for operands in tiles]
        for block in range(STEP // BLOCK):
            inputs = tiles[0].inputs(step * (STEP // BLOCK) + block)
            for operands, own_scales, own_words, own in zip(tiles, stored, words, sums):
                scales = _scale_pair(lanes, own_scales[block // 2], block % 2)
                for which in range(2):
                    word, chain = own_words[2 * block + which], which % chains
                    a = lanes.asm(_DECODE_MXFP4, [word, scales], [I32] * 4, _decode_mxfp4)
                    own[chain] = operands.multiply(a, inputs, which, own[chain], "bf16")
    return [functools.reduce(_added, own) for own in sums]


def _fp8(operands: _Operands) -> Sums:
    """Each segment is a chain of its own, for its scale."""
    lanes, sums = operands.lanes, operands.zeros()
    for segment in range(operands.cols // FP8_SEGMENT):
        scales, parts = operands.scales(segment, F32), operands.zeros()
        for block in (2 * segment, 2 * segment + 1):
            words, inputs = operands.codes(block * 128), operands.inputs(block)
            for which in range(2):
                a = [half for word in words[2 * which : 2 * which + 2] for half in _decoded_fp8(lanes, word)]
                parts = operands.multiply(a, inputs, which, parts, "f16")
        sums = [[lanes.fma(part[i], scales[i // 2], old[i]) for i in range(4)] for part, old in zip(parts, sums)]
    return sums


def _bf16(operands: _Operands) -> Sums:
    chains = [operands.zeros(), operands.zeros()]
    for block in range(operands.cols // BLOCK):
        inputs = operands.inputs(block)
        for which in range(2):
            a = operands.codes((2 * block + which) * 128)
            chains[which] = operands.multiply(a, inputs, which, chains[which], "bf16")
    return _added(*chains)


_PRODUCTS = {"mxfp4": lambda operands: _mxfp4([operands], chains=2)[0], "fp8": _fp8, "bf16": _bf16}


def summed(values: Sequence[Value]) -> Value:
    """In their order."""
    return functools.reduce(operator.add, values)


def _added(first: Sums, second: Sums) -> Sums:
    return [[a + b for a, b in zip(*both)] for both in zip(first, second)]


def _add_up(lanes: Lanes, products: Sums, sums: Memory, scratch: Memory, item: Value, is_first: Value) -> None:
    """The four warps' parts, in order, to the item's sums; a thread does one sum of each eight tokens."""
    count, size = len(products), len(products) * TOKENS * SUM_STRIDE
    lanes.barrier()  # the parts before these have been read
    for group, values in enumerate(products):
        lanes.store(values, scratch, lanes.warp * size + lanes.lane * 4 + group * FRAGMENT)
    lanes.barrier()
    own = lanes.thread * count
    parts = [lanes.load(scratch, own + warp * size, F32, count) for warp in range(WARPS)]
    before = lanes.load(sums, item * size + own, F32, count)
    zero, begins = lanes.constant(0.0, F32), is_first.equals(1)
    totals = [summed(column) for column in zip(*parts)]
    after = [lanes.select(begins, zero, old) + total for old, total in zip(before, totals)]
    lanes.store(after, sums, item * size + own)


def _each_sum(lanes: Lanes, sums: Memory, item: Value, tokens: int) -> Iterator[tuple[Value, Value, Value]]:
    """Token, row and sum, for each sum that is this thread's: 16 threads have a token's rows."""
    lanes.barrier()
    for first in range(0, tokens * ROWS, WARPGROUP):
        number = lanes.thread + first
        token, row = number // ROWS, number % ROWS
        yield token, row, lanes.load_one(sums, item * (tokens * SUM_STRIDE) + place(token, row))


def _activated(
    lanes: Lanes, sums: Memory, first: Value, token: Value, feature: Value, factor: Value, is_shifted: bool
) -> Value:
    gate, up = (lanes.load_one(sums, first + place(token, feature + row)) * factor for row in (0, 8))
    silu = gate * lanes.reciprocal(lanes.exp2(gate * -LOG2_E) + 1.0)
    return silu * up * 2.0**-INPUT_SHIFT if is_shifted else silu * up


def _scale_pair(lanes: Lanes, stored: Value, block: int) -> Value:
    """Two scales times 2**126 in bf16, for rows g and g + 8, of a word that holds them for two blocks."""

    def twin(words: np.ndarray) -> np.ndarray:
        low, high = (words.view(np.uint32) >> (16 * block + shift) & 255 for shift in (0, 8))
        return (low << 7 | high << 23).view(np.int32)

    return lanes.asm(scale_pair_text(block), [stored], [I32], twin)[0]


def _decode_mxfp4(words: np.ndarray, scales: np.ndarray) -> list[np.ndarray]:
    """NumPy's twin: the four registers of a word, each of two bf16."""
    words = words.view(np.uint32)
    rotated = [words << by | words >> (32 - by) if by else words for by in map(np.uint32, hopper_layout.ROTATIONS)]
    registers = [word & np.uint32(CODE_BITS) for word in rotated]
    mantissa = words << np.uint32(hopper_layout.LAST_MANTISSA) & np.uint32(LAST_BITS[1])
    registers[3] = rotated[3] & np.uint32(LAST_BITS[0]) | mantissa
    factors = _halves(scales, ml_dtypes.bfloat16)
    products = [_halves(word, ml_dtypes.bfloat16) * factors[:, i % 2, None] for i, word in enumerate(registers)]
    return [np.ascontiguousarray(product).view(np.int32)[:, 0] for product in products]


def _decoded_fp8(lanes: Lanes, word: Value) -> list[Value]:
    """Four e4m3 of a word as two words of float16, the low ones first."""

    def twin(words: np.ndarray) -> list[np.ndarray]:
        numbers = _halves(words, ml_dtypes.float8_e4m3fn).astype(np.float16)
        return list(np.ascontiguousarray(numbers).view(np.int32).T)

    return lanes.asm(_DECODE_FP8, [word], [I32, I32], twin)


def _halves(words: np.ndarray, dtype: Any) -> np.ndarray:
    """The numbers [words, parts of a word]."""
    return np.ascontiguousarray(words)[:, None].view(dtype)
