"""Expert stacks as the Hopper kernel reads them: tiles of tensor-core operands, each tile one contiguous copy.

A tile is 16 rows by `span` columns. Its codes come as 32-bit words, each the whole A operand of one thread for one
`mma.m16n8k16` (rows g and g + 8, four columns), with the bits placed so that three rotations and five masks turn
a word into bf16 numbers. Its scales follow. Four or eight tiles, for the warps of a warpgroup, are one slot of the
kernel's ring: the four column quarters of one or two row blocks of gate and up, or eight row blocks of down.

Words and published bytes (`mxfp4`) are images of each other, bit for bit. Every function takes numpy or JAX arrays.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from pallas_kernels import mxfp4

ROWS = 16  # of a tile: M of the tensor core's instruction
WARPS = 4  # of a warpgroup, which works on one slot at a time
NARROW = 256  # columns of a tile up to which a slot has two tiles for each warp, to share what a slot costs beside them
STEP = 128  # columns of the kernel's inner loop: two 16-byte loads of codes, one 8-byte load of scales
DOWN_SPAN = 256  # columns of a tile of down: the least whose bytes are whole 128-byte lines, which single copies need
GRANULES = 4  # parts of a long row whose sums are kept apart, so that work can be dealt out finely
LONG = 4096  # columns of a long row

# A word holds, in each 16-bit half p, one code of each of four operand registers (0: row g, 1: row g + 8, 2 and 3: the
# same rows two columns on). Register r is the word rotated left by ROTATIONS[r], masked to the bits of bf16 that
# have the value times 2**-126: sign 15, exponent 8 and 7, mantissa 6. Sixteen bits cannot be tiled by four rotations of
# those four, so the mantissa of register 3 has a rotation of its own; found by trying all.
ROTATIONS = (0, 4, 10, 14)
LAST_MANTISSA = 6
FIELDS = (15, 8, 7, 6)  # where the bits 3, 2, 1, 0 of a code belong in a half of a register
# Stored scale bytes are E8M0 + 126 modulo 256: then byte << 7 is bf16 of the scale times 2**126.
SCALE_OFFSET = 126
LARGEST_SCALE = 128  # E8M0 byte, a scale of 2; above it the kernel's scale is no finite bf16 number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """Stacks as published: codes uint8 [S, N, K/2] and scales uint8 [S, N, K/32]; gate and up [F, D], down [D, F].

    S counts the experts of one layer, or of several layers one behind the other.
    """

    gate: Any
    up: Any
    down: Any

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, hidden size, features."""
        stack, features, half = self.gate[0].shape
        return stack, 2 * half, features


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledExperts:
    """The same stacks in tiles: int32 [S, granules, slots, words of a slot]; rows of gate and up alternate by eights.

    Devices that share the features cut the third axis of `gate_up` and the second of `down`.
    """

    gate_up: Any
    down: Any

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, hidden size, features."""
        stack, granules, slots, words = self.gate_up.shape
        features = DOWN_SPAN * self.down.shape[1]
        units = 2 * features // (ROWS * slots)
        return stack, granules * words * 8 // (17 * units), features


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a matrix of `rows` by `cols` is cut."""

    rows: int
    cols: int
    span: int  # columns of a tile
    granules: int
    by_columns: bool  # the warps share the columns of a row block; else each has a row block of its own

    @property
    def slots(self) -> int:
        """Slots of one granule."""
        return self.rows // (ROWS * self.units)

    @property
    def units(self) -> int:
        """Row blocks of a slot, each the least that is dealt out to a processor."""
        return self.slot_tiles // self.unit_tiles

    @property
    def unit_tiles(self) -> int:
        return WARPS if self.by_columns else 1

    @property
    def slot_tiles(self) -> int:
        return WARPS * (2 if self.span <= NARROW else 1)

    @property
    def tile_words(self) -> int:
        return 2 * self.span + self.span // 8

    @property
    def slot_words(self) -> int:
        return self.slot_tiles * self.tile_words

    @property
    def page_cols(self) -> int:
        """Columns of the activations that a slot needs."""
        return self.span * (WARPS if self.by_columns else 1)


def gate_up_tiling(hidden: int, features: int) -> Tiling:
    """Of gate and up together; ValueError, naming the size, where the kernel has none."""
    granules = GRANULES if hidden >= LONG else 1
    cut = Tiling(2 * features, hidden, hidden // (granules * WARPS), granules, True)
    if cut.rows % (ROWS * cut.units) or hidden % (granules * WARPS * STEP):
        raise ValueError(
            f"gate and up of {features} x {hidden} cannot be tiled: rows must be a multiple of 16, columns of "
            f"{granules * WARPS * STEP}"
        )
    return cut


def down_tiling(hidden: int, features: int) -> Tiling:
    """Of down; ValueError, naming the size, where the kernel has none."""
    cut = Tiling(hidden, features, DOWN_SPAN, features // DOWN_SPAN, False)
    if features % DOWN_SPAN or hidden % (ROWS * cut.units):
        raise ValueError(
            f"down of {hidden} x {features} cannot be tiled: columns must be a multiple of {DOWN_SPAN}, rows of "
            f"{ROWS * cut.units}"
        )
    return cut


def tile_experts(experts: PackedExperts) -> TiledExperts:
    """Published stacks to tiles: the same bits in another order. Done once, at load."""
    _, hidden, features = experts.sizes
    codes, scales = (_alternate(gate, up) for gate, up in zip(experts.gate, experts.up))
    return TiledExperts(
        _tile(codes, scales, gate_up_tiling(hidden, features)),
        _tile(experts.down[0], experts.down[1], down_tiling(hidden, features)),
    )


def untile_experts(experts: TiledExperts) -> PackedExperts:
    """The inverse of `tile_experts`."""
    _, hidden, features = experts.sizes
    codes, scales = _untile(experts.gate_up, gate_up_tiling(hidden, features))
    pairs = [rows.reshape(rows.shape[0], features // 8, 2, 8, -1) for rows in (codes, scales)]
    gate, up = (tuple(rows[:, :, which].reshape(rows.shape[0], features, -1) for rows in pairs) for which in (0, 1))
    return PackedExperts(gate, up, _untile(experts.down, down_tiling(hidden, features)))


def check_scales(scales: UInt8[Array | np.ndarray, "*S G"], name: str) -> None:
    """ValueError, with the value, for a scale above 2, which the kernel cannot multiply by."""
    largest = int(scales.max())
    if largest > LARGEST_SCALE:
        raise ValueError(
            f"{name}: scale byte {largest} is above {LARGEST_SCALE} (a scale of 2), which backend 'mosaic_gpu' cannot "
            "serve; 'reference' and 'triton' can"
        )


def _namespace(x: Any) -> ModuleType:
    return np if isinstance(x, np.ndarray) else jnp


def _alternate(gate: Any, up: Any) -> Any:
    """Rows 0-7 of gate, rows 0-7 of up, rows 8-15 of gate, and so on."""
    stack, features, width = gate.shape
    both = [rows.reshape(stack, features // 8, 1, 8, width) for rows in (gate, up)]
    return _namespace(gate).concatenate(both, axis=2).reshape(stack, 2 * features, width)


def _bit(register: int, half: int, field: int) -> int:
    """Where a word keeps bit `field` (3: sign ... 0: mantissa) of the code of a register's half."""
    target = 16 * half + FIELDS[3 - field]
    is_apart = register == 3 and field == 0
    return (target - (LAST_MANTISSA if is_apart else ROTATIONS[register])) % 32


def _tile(codes: Any, scales: Any, cut: Tiling) -> Any:
    """Codes [S, N, K/2] and scales [S, N, K/32] -> int32 [S, granules, slots, slot words]."""
    xp, stack = _namespace(codes), codes.shape[0]
    blocks = (stack, cut.rows // ROWS, 2, 8, cut.cols // cut.span)
    # columns of a tile: 64 at a time, blocks of 32, thread, step of the instruction, column pair, column
    elements = mxfp4.unpack(codes).reshape(*blocks, cut.span // 64, 2, 4, 2, 2, 2).astype(np.uint32)
    words = 0
    for register in range(4):
        for half in range(2):
            code = elements[:, :, register % 2, ..., register // 2, half]
            for field in range(4):
                words = words | ((code >> field) & 1) << _bit(register, half, field)
    # stack, row block, row, tile, 64, block, thread, step -> ... tile, 64, row, thread, block, step
    words = xp.transpose(words, (0, 1, 3, 4, 2, 6, 5, 7)).reshape(stack, blocks[1], blocks[4], -1)
    stored = (scales.astype(np.uint32) + SCALE_OFFSET & 255).reshape(*blocks, cut.span // STEP, 2, 2)
    # stack, row block, half, row, tile, 128, 64, block -> ... tile, 128, row, 64, (block, half): four bytes a word
    stored = xp.transpose(stored, (0, 1, 4, 5, 3, 6, 7, 2)).reshape(stack, blocks[1], blocks[4], -1, 4)
    stored = stored[..., 0] | stored[..., 1] << 8 | stored[..., 2] << 16 | stored[..., 3] << 24
    return _slots(xp.concatenate([words, stored], axis=-1).view(np.int32), cut)


def _untile(tiles: Any, cut: Tiling) -> tuple[Any, Any]:
    xp, stack = _namespace(tiles), tiles.shape[0]
    blocks, across = cut.rows // ROWS, cut.cols // cut.span
    tiles = _unslots(tiles, cut).view(np.uint32)
    words = tiles[..., : 2 * cut.span].reshape(stack, blocks, across, cut.span // 64, 8, 4, 2, 2)
    halves = []
    for register in range(4):
        codes = [sum((words >> _bit(register, half, f) & 1) << f for f in range(4)) for half in range(2)]
        halves.append(xp.stack(codes, axis=-1).astype(np.uint8))
    # stack, block, tile, 64, row, thread, block, step, (column pair, row half), column
    elements = xp.stack(halves, axis=-2).reshape(stack, blocks, across, cut.span // 64, 8, 4, 2, 2, 2, 2, 2)
    elements = xp.transpose(elements, (0, 1, 9, 4, 2, 3, 6, 5, 7, 8, 10)).reshape(stack, cut.rows, cut.cols)
    stored = tiles[..., 2 * cut.span :].reshape(stack, blocks, across, cut.span // STEP, 8, 2)
    stored = xp.stack([stored >> shift & 255 for shift in (0, 8, 16, 24)], axis=-1)
    stored = stored.reshape(*stored.shape[:-1], 2, 2)  # stack, block, tile, 128, row, 64, block, half
    stored = xp.transpose(stored, (0, 1, 7, 4, 2, 3, 5, 6)).reshape(stack, cut.rows, cut.cols // mxfp4.BLOCK)
    return mxfp4.pack(elements), (stored - SCALE_OFFSET & 255).astype(np.uint8)


def _slots(tiles: Any, cut: Tiling) -> Any:
    """[S, row blocks, tiles across, words] -> [S, granules, slots, slot words]."""
    stack, xp = tiles.shape[0], _namespace(tiles)
    tiles = tiles.reshape(stack, cut.slots, cut.units, cut.granules, cut.unit_tiles, cut.tile_words)
    slots = xp.transpose(tiles, (0, 3, 1, 2, 4, 5)).reshape(stack, cut.granules, cut.slots, cut.slot_words)
    return np.ascontiguousarray(slots) if xp is np else slots


def _unslots(slots: Any, cut: Tiling) -> Any:
    stack, xp = slots.shape[0], _namespace(slots)
    tiles = slots.reshape(stack, cut.granules, cut.slots, cut.units, cut.unit_tiles, cut.tile_words)
    tiles = xp.transpose(tiles, (0, 2, 3, 1, 4, 5))
    return tiles.reshape(stack, cut.rows // ROWS, cut.cols // cut.span, cut.tile_words)
