"""What the Hopper kernel is compiled for: how matrices are cut, and where everything lies.

A matrix is cut into row blocks of 16 and chunks of columns; a row block of a chunk is what one slot of the ring holds.
Columns of inputs come in parts, of which shared memory holds three; a part has one, two or four chunks, by the format.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pallas_kernels.expert_matmul.hopper_layout import STEP
from pallas_kernels.lanes import WARPGROUP

ROWS = 16  # of a row block: M of the tensor core's instruction
WARPS = 4  # of a warpgroup, which works on one slot at a time
CONSUMERS = 4  # warpgroups
CONSUMER_THREADS = CONSUMERS * WARPGROUP
SLOT_COPIES = 2  # that a slot has room for: of one piece, or of two experts
SLOT_WORDS = 3264  # 13,056 bytes: 16 x 1536 of MXFP4, 16 x 768 of FP8, each with their scales
PART_COLS = (1536, 1024, 512)  # the first that divides a matrix' columns is its part
COLUMN_UNIT = PART_COLS[-1]
CHUNKS_PER_PART = {"mxfp4": 1, "fp8": 2, "bf16": 4}
FORMATS = tuple(CHUNKS_PER_PART)
# Words between tokens in a page beyond their columns: eight threads that read 16 bytes of two tokens hit all banks.
PAGE_GAP = 16
FP8_SEGMENT = 64  # columns that share a scale, half of a published block: what a warp has of a chunk begins anywhere
LINE_WORDS = 32  # 128 bytes: copies into shared memory are whole lines
OWN_COLUMNS = 3 * ROWS  # of the residual, at most those of one CTA
GAINS = 2 * LINE_WORDS  # of a norm, that a CTA copies for its own columns
# What a product reads, by the format of its weights: a type, and the power of two by which inputs are multiplied.
# Decoded without a multiplication, MXFP4 is bf16 times 2^-126; such products would be too small for float32.
INPUT_TYPE = {"mxfp4": "bf16", "fp8": "f16", "bf16": "bf16"}
INPUT_SHIFT = {"mxfp4": 64, "fp8": -6, "bf16": 0}
LOG2_E = math.log2(math.e)  # for exp2, which is what the hardware has


def padded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def code_words(format: str, cols: int) -> int:
    """Of 16 rows, without their scales."""
    return {"mxfp4": 2, "fp8": 4, "bf16": 8}[format] * cols


def tile_words(format: str, cols: int) -> int:
    """Of 16 rows, the scales behind their codes."""
    return code_words(format, cols) + {"mxfp4": cols // 8, "fp8": ROWS * cols // FP8_SEGMENT, "bf16": 0}[format]


@dataclasses.dataclass(frozen=True)
class Columns:
    """How columns of inputs are cut: into parts, of which shared memory holds three, and parts into chunks."""

    count: int  # a multiple of COLUMN_UNIT
    part_chunks: int

    @property
    def part_cols(self) -> int:
        return next(cols for cols in PART_COLS if self.count % cols == 0)

    @property
    def parts(self) -> int:
        return self.count // self.part_cols

    @property
    def chunk_cols(self) -> int:
        return self.part_cols // self.part_chunks

    @property
    def chunks(self) -> int:
        return self.parts * self.part_chunks


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How a product's inputs lie in global memory: part after part, each as a page of shared memory will have it."""

    columns: Columns
    tokens: int

    @property
    def token_words(self) -> int:
        """Two columns each, and the gap."""
        return self.columns.part_cols // 2 + PAGE_GAP

    @property
    def part_words(self) -> int:
        return self.tokens * self.token_words

    @property
    def words(self) -> int:
        return self.columns.parts * self.part_words

    def place(self, token: Any, column: Any) -> Any:
        """The word of an even column, and of the one after it."""
        within = column % self.columns.part_cols // 2
        return column // self.columns.part_cols * self.part_words + token * self.token_words + within


@dataclasses.dataclass(frozen=True)
class Down:
    """How experts' down is multiplied: a slot has one or two experts, whose columns several warps share."""

    features: int
    tiles: int  # row blocks of a CTA, at most

    @property
    def tile_words(self) -> int:
        return tile_words("mxfp4", self.features)

    @property
    def unit_words(self) -> int:
        """Of an expert in a slot."""
        return self.tiles * self.tile_words

    @property
    def units(self) -> int:
        """Experts in a slot."""
        return SLOT_COPIES if SLOT_COPIES * self.unit_words <= SLOT_WORDS else 1

    @property
    def splits(self) -> int:
        """Warps that share an expert's columns."""
        return next((ways for ways in (WARPS // self.units, 2) if self.features % (ways * STEP) == 0), 1)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One weight matrix, or each of a stack; `cols` are a multiple of COLUMN_UNIT, padded with zeros."""

    rows: int
    cols: int
    format: str  # "mxfp4", "fp8" or "bf16"

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def columns(self) -> Columns:
        return Columns(self.cols, CHUNKS_PER_PART[self.format])

    @property
    def warp_cols(self) -> int:
        """Of a chunk, those of one warp: the four quarters side by side."""
        return self.columns.chunk_cols // WARPS

    @property
    def tile_words(self) -> int:
        return tile_words(self.format, self.warp_cols)

    @property
    def slot_words(self) -> int:
        """Of a row block of a chunk: the four warps' tiles one after the other."""
        return WARPS * self.tile_words
