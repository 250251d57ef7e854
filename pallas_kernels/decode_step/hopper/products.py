"""Matrix products of a warpgroup: a slot's weights times a page's inputs, and what becomes of an item's sums.

Weights are the M operand of `mma.m16n8k16` (16 rows), tokens the N operand (8 or 16); `weights` tells their order.
No sum depends on the number of tokens, on what other tokens hold, or on which CTA forms it. A warp adds up its quarter
of the columns, of all of an item's chunks or of every second to fourth; who stores the item adds these parts in their
order. They lie as the instruction leaves them, a thread's four side by side (`_each_sum`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from pallas_kernels.decode_step.hopper.config import (
    CONSUMER_THREADS,
    FP8_SEGMENT,
    INPUT_SHIFT,
    INPUT_TYPE,
    LOG2_E,
    OWN_COLUMNS,
    PAGE_GAP,
    ROWS,
    WARPS,
    Down,
    Inputs,
    Matrix,
    code_words,
)
from pallas_kernels.expert_matmul import hopper_layout
from pallas_kernels.expert_matmul.hopper_layout import STEP
from pallas_kernels.expert_matmul.mosaic_tile import CODE_BITS, LAST_BITS, unscaled_text
from pallas_kernels.lanes import WARPGROUP, Lanes, Memory, Value
from pallas_kernels.lanes.values import F32, I32

Tile = Callable[[Lanes, Sequence[Memory], dict[str, Value]], None]
Sums = list[list[Value]]  # a thread's four sums of each eight tokens
TOKENS = 8  # N of the instruction
BLOCK = 32  # columns whose operands a thread has side by side: of two instructions
FRAGMENT = ROWS * TOKENS  # sums of one instruction

_DECODE_MXFP4 = f"{{\n.reg .b32 t;\n{unscaled_text('$4', ('$0', '$1', '$2', '$3'), 't')}}}"
_DECODE_FP8 = """{
.reg .b16 lo, hi;
mov.b32 {lo, hi}, $2;
cvt.rn.f16x2.e4m3x2 $0, lo;
cvt.rn.f16x2.e4m3x2 $1, hi;
}"""


def multiply_chunk(matrix: Matrix, tokens: int) -> Tile:
    """Adds a slot's row block, times the inputs of its chunk, to a part of an item's sums. Warps do not meet.

    Memories: slot int32 [slot_words]; page int32, a token's inputs every part_cols/2 + PAGE_GAP words, see INPUT_TYPE;
    sums float32 [parts, WARPS, tokens * ROWS]. Scalars: part; first, the page's word with the chunk's first column of
    token 0; is_first, 1 if the part begins with this chunk.
    """
    token_words = Inputs(matrix.columns, tokens).token_words

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        slot, page, sums = memories
        row, quad = lanes.lane // 4, lanes.lane % 4
        inputs = scalars["first"] + lanes.warp * (matrix.warp_cols // 2) + row * token_words + quad * 4
        groups = [inputs + first * token_words for first in range(0, tokens, TOKENS)]
        codes = lanes.warp * matrix.tile_words + lanes.lane * 4
        scales = lanes.warp * matrix.tile_words + (row * 2 + code_words(matrix.format, matrix.warp_cols))
        operands = _Operands(lanes, matrix.warp_cols, slot, codes, scales, page, groups)
        products = _PRODUCTS[matrix.format](operands)
        part = (scalars["part"] * WARPS + lanes.warp) * (tokens * ROWS) + lanes.lane * 4
        begins, zero = scalars["is_first"].equals(1), lanes.constant(0.0, F32)
        for group, values in enumerate(products):
            before = lanes.load(sums, part + group * FRAGMENT, F32, 4)
            after = [lanes.select(begins, zero, old) + value for old, value in zip(before, values)]
            lanes.store(after, sums, part + group * FRAGMENT)

    return tile


def store_rows(rows: int, tokens: int, ways: int, has_factors: bool) -> Tile:
    """A row block of a product, times the tokens' factors, if there are any.

    Memories: sums float32 [items, ways * WARPS, tokens * ROWS]; out float32 [tokens, rows]; factors float32 [tokens],
    if any. Scalars: item, block.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        sums, out, *factors = memories
        for token, row, value in _each_sum(lanes, sums, scalars["item"], tokens, ways):
            column = scalars["block"] * ROWS + row
            scaled = value * lanes.load_one(factors[0], token) if has_factors else value
            with lanes.when(column < rows):
                lanes.store([scaled], out, token * rows + column)

    return tile


def store_own(columns: int, tokens: int, ways: int) -> Tile:
    """Memories: sums as for `store_rows`; own float32 [tokens, columns].

    Scalars: item, whose rows become columns 16 * item and on.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        sums, own = memories
        for token, row, value in _each_sum(lanes, sums, scalars["item"], tokens, ways):
            lanes.store([value], own, token * columns + scalars["item"] * ROWS + row)

    return tile


def store_activated(
    place_of: Callable[[Value, Value], Value], tokens: int, ways: int, format: str, unit_blocks: int | None = None
) -> Tile:
    """silu(gate) * up of row blocks of gate and up, which alternate by eights: eight features. Each warp has an item.

    Memories: sums as for `store_rows`; hidden int32, two features a word, at `place_of(row, feature)`; factors float32
    [tokens], of gate and up; pairs int32 [units * tokens], if blocks belong to units. A token's row is its own number,
    or its pair's, -1 for none. `format` is that of the weights that read them. Scalars: item and block, of warp 0, the
    blocks of all units in turn; items that there are.
    """
    count, size = ways * WARPS, tokens * ROWS

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        sums, hidden, factors, *pairs = memories
        feature, quad = lanes.lane // 4, lanes.lane % 4
        item, block = scalars["item"] + lanes.warp, scalars["block"] + lanes.warp
        within = block % unit_blocks if unit_blocks else block
        is_even = (feature % 2).equals(0)
        with lanes.when(item < scalars["items"]):
            for first in range(0, tokens, TOKENS):
                own = item * (count * size) + lanes.lane * 4 + first * ROWS
                parts = [lanes.load(sums, own + part * size, F32, 4) for part in range(count)]
                gates_ups = [_in_order(column, ways) for column in zip(*parts)]
                token = quad * 2 + first
                factor = lanes.load(factors, token, F32, 2)
                mine = [_activated(lanes, *both, INPUT_SHIFT[format]) for both in zip(gates_ups, gates_ups[2:], factor)]
                # Threads of even features have two features of the first token, those of odd ones of the second.
                other = lanes.shuffle(lanes.select(is_even, mine[1], mine[0]), 4)
                low, high = lanes.select(is_even, mine[0], other), lanes.select(is_even, other, mine[1])
                token = token + feature % 2
                row = lanes.load_one(pairs[0], block // unit_blocks * tokens + token, I32) if unit_blocks else token
                with lanes.when(row >= 0):
                    at = place_of(row, within * 8 + feature // 2 * 2)
                    lanes.store([lanes.pack(low, high, INPUT_TYPE[format])], hidden, at)

    return tile


def multiply_expert_down(down: Down, chosen: int, tokens: int) -> Tile:
    """A slot's experts' row blocks of down times their tokens' hidden rows; a warp has a part of an expert's columns.

    Memories: slot int32 [units, tiles, tile_words], tiles of 16 rows by all features; page int32, a pair's hidden row
    every features/2 + PAGE_GAP words; products float32 [splits, pairs, OWN_COLUMNS]; pairs int32
    [experts * tokens], -1 for none. Scalars: number, of the slot; units, of all slots; tiles that are the CTA's, and
    how many there are before them.
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
            numbers = [(scalars["before"] + number).minimum(down.tiles - 1) for number in range(down.tiles)]
            firsts_of = [number * down.tile_words for number in numbers]
            tiles = [_Operands(lanes, cols, slot, codes + at, scales + at, page, inputs) for at in firsts_of]
            for number, found in enumerate(_mxfp4(tiles)):
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


def _mxfp4(tiles: Sequence[_Operands]) -> list[Sums]:
    """Of several tiles with the same inputs. Each block of 32 columns is a chain of its own, for its scale."""
    lanes = tiles[0].lanes
    sums = [operands.zeros() for operands in tiles]
    for step in range(tiles[0].cols // STEP):
        stored = [operands.scales(step, I32) for operands in tiles]
        words = [operands.codes(step * 256) + operands.codes(step * 256 + 128) for operands in tiles]
        for block in range(STEP // BLOCK):
            inputs = tiles[0].inputs(step * (STEP // BLOCK) + block)
            for number, operands in enumerate(tiles):
                parts = operands.zeros()
                for which in range(2):
                    a = lanes.asm(_DECODE_MXFP4, [words[number][2 * block + which]], [I32] * 4, _decode_mxfp4)
                    parts = operands.multiply(a, inputs, which, parts, "bf16")
                scales = _two_scales(stored[number][block // 2], block % 2)
                sums[number] = _scaled(lanes, parts, scales, sums[number])
    return sums


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
        sums = _scaled(lanes, parts, scales, sums)
    return sums


def _bf16(operands: _Operands) -> Sums:
    chains = [operands.zeros(), operands.zeros()]
    for block in range(operands.cols // BLOCK):
        inputs = operands.inputs(block)
        for which in range(2):
            a = operands.codes((2 * block + which) * 128)
            chains[which] = operands.multiply(a, inputs, which, chains[which], "bf16")
    return _added(*chains)


_PRODUCTS = {"mxfp4": lambda operands: _mxfp4([operands])[0], "fp8": _fp8, "bf16": _bf16}


def summed(values: Sequence[Value]) -> Value:
    """In their order."""
    return functools.reduce(operator.add, values)


def _added(first: Sums, second: Sums) -> Sums:
    return [[a + b for a, b in zip(*both)] for both in zip(first, second)]


def _scaled(lanes: Lanes, parts: Sums, scales: Sequence[Value], sums: Sums) -> Sums:
    """The sums and a chain's, times the scales of rows g and g + 8."""
    return [[lanes.fma(part[i], scales[i // 2], old[i]) for i in range(4)] for part, old in zip(parts, sums)]


def _each_sum(lanes: Lanes, sums: Memory, item: Value, tokens: int, ways: int) -> list[tuple[Value, Value, Value]]:
    """Token, row and sum, for each sum that is this thread's. All teams have met before."""
    count, size, found = ways * WARPS, tokens * ROWS, []
    for first in range(0, size, WARPGROUP):
        own = item * (count * size) + lanes.thread + first
        value = _in_order([lanes.load_one(sums, own + part * size) for part in range(count)], ways)
        thread, which = lanes.thread // 4, lanes.thread % 4
        token = thread % 4 * 2 + which % 2 + first // ROWS
        found.append((token, thread // 4 + which // 2 * 8, value))
    return found


def _in_order(parts: Sequence[Value], ways: int) -> Value:
    """The sum of parts [ways, WARPS]: a warp's before the next one's."""
    return summed([summed([parts[way * WARPS + warp] for way in range(ways)]) for warp in range(WARPS)])


def _activated(lanes: Lanes, gate: Value, up: Value, factor: Value, shift: int) -> Value:
    """silu(gate) * up of the sums times the factor, times 2**shift."""
    gate, up = gate * factor, up * factor
    silu = gate * lanes.reciprocal(lanes.exp2(gate * -LOG2_E) + 1.0)
    return silu * up * 2.0**shift if shift else silu * up


def _two_scales(stored: Value, block: int) -> list[Value]:
    """Of rows g and g + 8, from a word that holds them for two blocks: exponents of float32."""
    places = [16 * block, 16 * block + 8]
    bits = [(stored & 255 << at) << 23 - at if at < 24 else stored >> 1 & 255 << 23 for at in places]
    return [word.as_float() for word in bits]


def _decode_mxfp4(words: np.ndarray) -> list[np.ndarray]:
    """NumPy's twin: the four registers of a word, each of two bf16, times 2**-126."""
    words = words.view(np.uint32)
    rotated = [words << by | words >> (32 - by) if by else words for by in map(np.uint32, hopper_layout.ROTATIONS)]
    registers = [word & np.uint32(CODE_BITS) for word in rotated]
    mantissa = words << np.uint32(hopper_layout.LAST_MANTISSA) & np.uint32(LAST_BITS[1])
    registers[3] = rotated[3] & np.uint32(LAST_BITS[0]) | mantissa
    return [word.view(np.int32) for word in registers]


def _decoded_fp8(lanes: Lanes, word: Value) -> list[Value]:
    """Four e4m3 of a word as two words of float16, the low ones first."""

    def twin(words: np.ndarray) -> list[np.ndarray]:
        codes = np.ascontiguousarray(words)[:, None].view(ml_dtypes.float8_e4m3fn)
        return list(codes.astype(np.float16).view(np.int32).T)

    return lanes.asm(_DECODE_FP8, [word], [I32, I32], twin)
