"""What one warpgroup does with one stage of tiles: decode in registers, multiply on tensor cores, store what each
(token, expert) pair asked for; inline code, for what Pallas offers takes twice the instructions (docs/LOG.md).

Weights are the M operand (16 rows of a tile), tokens the N operand (8 or 16). No order of summation depends on how many
tokens there are, which experts they chose, or which SM the stage was given to.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import mxfp4
from pallas_kernels.expert_matmul import hopper_layout
from pallas_kernels.expert_matmul.hopper_layout import STEP, WARPS, Tiling

PAIRS = mxfp4.BLOCK // 2  # 32-bit words of a block of activations
COLUMNS = 8  # N of the tensor core's instruction
# Floats between tokens in the buffer of sums: 16 rows, and each thread of a warp writes a bank of its own.
SUM_STRIDE = 20
# Numbers after each token in an activation buffer: eight threads read 64 bytes of two tokens, and hit each bank once.
BUFFER_GAP = 32
CODE_BITS = 0x81C081C0  # sign, exponent and mantissa bits that e2m1 has, in both bf16 halves
LAST_BITS = 0x81808180, 0x00400040  # the same for the register whose mantissa is kept apart
SCALE_BYTES = 0x1404, 0x3424  # selects two of four scale bytes into the upper bytes of the halves, zeros below

_MULTIPLY = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{{${0}, ${1}, ${2}, ${3}}}, {{a0, a1, a2, a3}}, {{${4}, ${5}}}, {{${6}, ${7}, ${8}, ${9}}};\n"
)

Scalars = dict[str, Any]  # group, K split, stage (of the K split), start and count (work items)
SCALARS = ("group", "k_split", "stage", "start", "count")


def scale_pair_text(which: int) -> str:
    """PTX: two scales times 2**126 in bf16, for rows g and g + 8, of a word that has them for two blocks."""
    return f"{{ .reg .b32 t; prmt.b32 t, $1, 0, {SCALE_BYTES[which]:#x}; shr.b32 $0, t, 1; }}"


def unscaled_text(word: str, outputs: Sequence[str], free: str) -> str:
    """PTX: the A operand of an instruction, 16 x 16 weights times 2**-126 as four registers of bf16, from a word.

    Statements, which use one more register.
    """
    turns = hopper_layout.ROTATIONS
    return f"""and.b32 {outputs[0]}, {word}, {CODE_BITS:#x};
shl.b32 {outputs[1]}, {word}, {turns[1]};
and.b32 {outputs[1]}, {outputs[1]}, {CODE_BITS:#x};
shf.l.wrap.b32 {outputs[2]}, {word}, {word}, {turns[2]};
and.b32 {outputs[2]}, {outputs[2]}, {CODE_BITS:#x};
shf.l.wrap.b32 {outputs[3]}, {word}, {word}, {turns[3]};
shl.b32 {free}, {word}, {hopper_layout.LAST_MANTISSA};
and.b32 {free}, {free}, {LAST_BITS[1]:#x};
and.b32 {outputs[3]}, {outputs[3]}, {LAST_BITS[0]:#x};
or.b32 {outputs[3]}, {outputs[3]}, {free};
"""


def decode_text(word: str, scales: str, then: str) -> str:
    """PTX: the same from a word and two scales, as registers a0 to a3, which what comes `then` reads."""
    return f"""{{
.reg .b32 a0, a1, a2, a3, s0, s1, t;
.reg .b16 lo, hi;
mov.b32 {{lo, hi}}, {scales};
mov.b32 s0, {{lo, lo}};
mov.b32 s1, {{hi, hi}};
{unscaled_text(word, ("a0", "a1", "a2", "a3"), "t")}mul.rn.bf16x2 a0, a0, s0;
mul.rn.bf16x2 a1, a1, s1;
mul.rn.bf16x2 a2, a2, s0;
mul.rn.bf16x2 a3, a3, s1;
{then}}}"""


def multiply_stage(tiling: Tiling, tokens: int, refs: Sequence[Any], scalars: Scalars) -> None:
    """Refs are a stage's weights, the buffer of its activations, that of the sums, the pairs and the result.

    The activations are bf16 [tokens, panel_cols + BUFFER_GAP]; the pairs, int32 [groups * tokens], name the row of the
    result [pairs, K splits, rows] for each token of each group, -1 for none.
    """
    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=((plgpu.RefType(),) * 5, (splat,) * len(SCALARS)))
    def inline(_, refs, values):
        values = dict(zip(SCALARS, (value.registers.item() for value in values)))
        _Emitter(tiling, tokens, refs, values).run()

    inline(tuple(refs), tuple(scalars[name] for name in SCALARS))


class _Emitter:
    """Code of one thread, as it is emitted."""

    def __init__(self, tiling: Tiling, tokens: int, refs: Sequence[Any], values: Scalars) -> None:
        self.tiling, self.tokens, self.values = tiling, tokens, values
        self.token_words = (tiling.panel_cols + BUFFER_GAP) // 2
        self.words, self.activations, self.sums, self.pairs, self.out = (utils.memref_ptr(ref) for ref in refs)
        self.i32, self.f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        self.thread = arith.remui(utils.thread_idx(), self.const(WARPS * 32))
        self.warp, lane = self.split(self.thread, 32)
        self.row, self.quad = self.split(lane, 4)  # g and t of the instruction's operand tables
        self.lane = lane

    def const(self, value: int) -> Any:
        return utils.c(value, self.i32)

    def split(self, value: Any, by: int) -> tuple[Any, Any]:
        return arith.divui(value, self.const(by)), arith.remui(value, self.const(by))

    def linear(self, *terms: tuple[Any, int]) -> Any:
        """sum of value * factor."""
        total = self.const(0)
        for value, factor in terms:
            total = arith.addi(total, arith.muli(value, self.const(factor)))
        return total

    def at(self, pointer: Any, index: Any, offset: int, element: ir.Type) -> Any:
        index = arith.addi(index, self.const(offset))
        return utils.getelementptr(pointer, [index], element)

    def load(self, pointer: Any, index: Any, offset: int, element: ir.Type, count: int = 1) -> list[Any]:
        width = count * (utils.bitwidth(element) // 8)
        kind = ir.VectorType.get((count,), element)
        vector = llvm.load(kind, self.at(pointer, index, offset, element), alignment=width)
        return [llvm.extractelement(vector, self.const(i)) for i in range(count)]

    def run(self) -> None:
        tiling = self.tiling
        if tiling.by_columns:
            owners = self.owners()
            first_block = self.linear((self.warp, tiling.span // mxfp4.BLOCK))
            for item in range(tiling.stage_items):
                with self.exists(self.const(item)) if item else contextlib.nullcontext():
                    tile = arith.addi(self.warp, self.const(item * WARPS))
                    self.add_up(item, self.product(tile, first_block), owners)
            return
        pairs = [self.pair(self.linear((self.quad, 2)), column) for column in self.own_columns()]
        for first in range(0, tiling.stage_items, WARPS):
            item = arith.addi(self.warp, self.const(first))
            with self.exists(item):
                self.store_rows(item, self.product(item, self.const(0)), pairs)

    def exists(self, item: Any) -> Any:
        """For `with`: what is inside is done if the stage has so many items."""
        return utils.when(arith.cmpi(arith.CmpIPredicate.ult, item, self.values["count"]))

    def own_columns(self) -> list[int]:
        """Of the tokens whose sums a thread holds, the distance from twice its quad."""
        return [column for first in range(0, self.tokens, COLUMNS) for column in (first, first + 1)]

    def pair(self, token: Any, offset: int) -> Any:
        index = arith.addi(self.linear((self.values["group"], self.tokens)), token)
        return self.load(self.pairs, index, offset, self.i32)[0]

    def owners(self) -> list[tuple[Any, Any]]:
        """Of each result that a thread adds up: its number, and the pair it is for. Loaded long before it is needed."""
        firsts = range(0, self.tokens * hopper_layout.ROWS, WARPS * 32)
        numbers = [arith.addi(self.thread, self.const(first)) for first in firsts]
        return [(number, self.pair(self.split(number, hopper_layout.ROWS)[0], 0)) for number in numbers]

    def product(self, number: Any, first_block: Any) -> list[list[Any]]:
        """A tile of the stage times the activations from a block on: for each 8 tokens, the thread's four sums."""
        tiling, groups = self.tiling, self.tokens // COLUMNS
        tile = self.linear((number, tiling.tile_words))
        codes = arith.addi(tile, self.linear((self.lane, 4)))
        scales = arith.addi(tile, self.linear((self.row, 2)))
        tokens = self.linear((first_block, PAIRS), (self.row, self.token_words), (self.quad, 4))
        zero = utils.c(0.0, self.f32)
        # Two chains, for even and odd instructions: one would wait for its own latency.
        chains = [[[zero] * 4 for _ in range(groups)] for _ in range(2)]
        for step in range(tiling.span // STEP):
            stored = self.load(self.words, scales, 2 * tiling.span + 16 * step, self.i32, 2)
            quads = [self.load(self.words, codes, (2 * step + half) * 128, self.i32, 4) for half in range(2)]
            for block in range(STEP // mxfp4.BLOCK):
                pair = self.scale_pair(stored[block // 2], block % 2)
                operands = self.token_operands(tokens, step * STEP // mxfp4.BLOCK + block)
                for which in range(2):
                    word = quads[block // 2][2 * (block % 2) + which]
                    halves = [operand[2 * which : 2 * which + 2] for operand in operands]
                    chains[which] = self.multiply(word, pair, halves, chains[which])
        return [[arith.addf(a, b) for a, b in zip(*both)] for both in zip(*chains)]

    def token_operands(self, tokens: Any, block: int) -> list[list[Any]]:
        """Each 8 tokens' 32 columns: the operands of two instructions, four registers."""
        firsts = [block * PAIRS + first * self.token_words for first in range(0, self.tokens, COLUMNS)]
        return [self.load(self.activations, tokens, first, self.i32, 4) for first in firsts]

    def scale_pair(self, stored: Any, which: int) -> Any:
        return llvm.inline_asm(self.i32, [stored], scale_pair_text(which), "=r,r", has_side_effects=False)

    def multiply(self, word: Any, scales: Any, operands: list[list[Any]], sums: list[list[Any]]) -> list[list[Any]]:
        """One decoding, one product per 8 tokens."""
        groups = len(sums)
        # Outputs come first, then the word, the scales, operands of each 8 tokens, and the sums.
        word_at, first = 4 * groups, 4 * groups + 2
        products = ""
        for group in range(groups):
            b, c = first + 2 * group, first + 2 * groups + 4 * group
            products += _MULTIPLY.format(*range(4 * group, 4 * group + 4), b, b + 1, *range(c, c + 4))
        asm = decode_text(f"${word_at}", f"${word_at + 1}", products)
        flat = [value for values in sums for value in values]
        inputs = [word, scales, *(value for values in operands for value in values), *flat]
        constraints = ",".join(["=f"] * len(flat) + ["r"] * (2 + 2 * groups) + ["f"] * len(flat))
        kind = llvm.StructType.get_literal([self.f32] * len(flat))
        found: Any = llvm.inline_asm(kind, inputs, asm, constraints, has_side_effects=False)
        values = [llvm.extractvalue(self.f32, found, [i]) for i in range(len(flat))]
        return [values[i : i + 4] for i in range(0, len(values), 4)]

    def add_up(self, item: int, products: list[list[Any]], owners: list[tuple[Any, Any]]) -> None:
        """Sums the four warps' parts in their order, through shared memory, and stores them."""
        utils.warpgroup_barrier()  # the sums before these have been read
        size = self.tokens * SUM_STRIDE
        own = self.linear((self.warp, size), (self.quad, 2 * SUM_STRIDE), (self.row, 1))
        for group, sums in enumerate(products):
            for index, value in enumerate(sums):  # (row g, token 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
                offset = (group * COLUMNS + index % 2) * SUM_STRIDE + index // 2 * 8
                llvm.store(value, self.at(self.sums, own, offset, self.f32), alignment=4)
        utils.warpgroup_barrier()
        first_row = self.first_row(self.const(item))
        for number, pair in owners:
            token, row = self.split(number, hopper_layout.ROWS)
            index = self.linear((token, SUM_STRIDE), (row, 1))
            parts = [self.load(self.sums, index, warp * size, self.f32)[0] for warp in range(WARPS)]
            self.store(functools.reduce(arith.addf, parts), pair, arith.addi(first_row, row))

    def store_rows(self, item: Any, products: list[list[Any]], pairs: list[Any]) -> None:
        row = arith.addi(self.first_row(item), self.row)
        for group, sums in enumerate(products):
            for index, value in enumerate(sums):
                self.store(value, pairs[2 * group + index % 2], arith.addi(row, self.const(index // 2 * 8)))

    def first_row(self, item: Any) -> Any:
        terms = (self.values["stage"], self.tiling.stage_items), (self.values["start"], 1), (item, 1)
        return self.linear((self.linear(*terms), hopper_layout.ROWS))

    def store(self, value: Any, pair: Any, row: Any) -> None:
        with utils.when(arith.cmpi(arith.CmpIPredicate.sge, pair, self.const(0))):
            k_splits, rows = self.tiling.k_splits, self.tiling.rows
            index = arith.addi(self.linear((pair, k_splits * rows), (self.values["k_split"], rows)), row)
            llvm.store(value, self.at(self.out, index, 0, self.f32), alignment=4)
