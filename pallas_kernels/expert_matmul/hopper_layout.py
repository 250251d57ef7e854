"""Expert stacks as the Hopper kernel reads them: tiles of tensor-core operands, each tile one contiguous copy.

A tile is 16 rows by `span` columns. Its codes come as 32-bit words, each the whole A operand of one thread for one
`mma.m16n8k16` (rows g and g + 8, four columns), with the bits placed so that three rotations and five masks turn
a word into bf16 numbers. Its scales follow. Four or eight tiles, for the warps of a warpgroup, fill one stage of the
kernel's pipeline: the four column quarters of one or two row blocks of gate and up, or eight row blocks of down.

Words and published bytes (`mxfp4`) are images of each other, bit for bit. Every function takes numpy or JAX arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import mxfp4

ROWS = 16  # of a tile: M of the tensor core's instruction
WARPS = 4  # of a warpgroup, which works on one stage at a time
NARROW = 256  # columns of a tile up to which a stage has two for each warp, to share what a stage costs beside them
STEP = 128  # columns of the kernel's inner loop: two 16-byte loads of codes, one 8-byte load of scales
DOWN_SPAN = 256  # columns of a tile of down: the least whose bytes are whole 128-byte lines, which single copies need
K_SPLITS = 4  # of a long row; their sums are kept apart, so that work can be distributed finely
LONG = 4096  # columns of a long row

# A word holds, in each 16-bit half p, one code of each of four operand registers (0: row g, 1: row g + 8, 2 and 3: the
# same rows two columns on). Register r is the word rotated left by ROTATIONS[r], masked to the bits of bf16 that
# have the value times 2**-126: sign 15, exponent 8 and 7, mantissa 6. Four rotations of those four cannot cover sixteen
# bits, so the mantissa of register 3 has a rotation of its own; found by trying all.
ROTATIONS = (0, 4, 10, 14)
LAST_MANTISSA = 6
FIELDS = (15, 8, 7, 6)  # where the bits 3, 2, 1, 0 of a code belong in a half of a register
# Stored scale bytes are E8M0 + 126 modulo 256: then byte << 7 is bf16 of the scale times 2**126.
SCALE_OFFSET = 126
LARGEST_SCALE = 128  # E8M0 byte, a scale of 2; above it the kernel's scale is no finite bf16 number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """Stacks as published: codes uint8 [E, O, I/2] and scales uint8 [E, O, I/32]; gate and up [F, D], down [D, F].

    E counts the experts of one layer, or of several layers one after the other.
    """

    gate: Any
    up: Any
    down: Any

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, hidden size, features."""
        experts, features, half = self.gate[0].shape
        return experts, 2 * half, features


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HopperExperts:
    """The Hopper layout: int32 [E, K splits, stages, words of a stage]; rows of gate and up alternate by eights.

    Devices that share the features split the third axis of `gate_up` and the second of `down`.
    """

    gate_up: Any
    down: Any

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, hidden size, features."""
        experts, k_splits, stages, words = self.gate_up.shape
        features = DOWN_SPAN * self.down.shape[1]
        items = 2 * features // (ROWS * stages)
        return experts, k_splits * words * 8 // (17 * items), features


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a matrix of `rows` by `cols` is split."""

    rows: int
    cols: int
    span: int  # columns of a tile
    k_splits: int
    by_columns: bool  # the warps share the columns of a row block; else each has a row block of its own

    @property
    def stages(self) -> int:
        """Stages of one K split."""
        return self.rows // (ROWS * self.stage_items)

    @property
    def stage_items(self) -> int:
        """Work items of a stage: row blocks, each the least that is distributed to an SM."""
        return self.stage_tiles // self.item_tiles

    @property
    def item_tiles(self) -> int:
        return WARPS if self.by_columns else 1

    @property
    def stage_tiles(self) -> int:
        return WARPS * (2 if self.span <= NARROW else 1)

    @property
    def tile_words(self) -> int:
        return 2 * self.span + self.span // 8

    @property
    def stage_words(self) -> int:
        return self.stage_tiles * self.tile_words

    @property
    def panel_cols(self) -> int:
        """Columns of the activations that a stage needs."""
        return self.span * (WARPS if self.by_columns else 1)


def gate_up_tiling(hidden: int, features: int) -> Tiling:
    """Of gate and up together."""
    k_splits = K_SPLITS if hidden >= LONG else 1
    return Tiling(2 * features, hidden, hidden // (k_splits * WARPS), k_splits, True)


def down_tiling(hidden: int, features: int) -> Tiling:
    """A K split is one tile wide."""
    return Tiling(hidden, features, DOWN_SPAN, features // DOWN_SPAN, False)


def unfit(hidden: int, features: int, scales: Mapping[str, Array | np.ndarray] = {}) -> str | None:
    """Why stacks of these sizes, with these E8M0 scales by the stack's name, have no Hopper layout; None if they do."""
    gate_up, down = gate_up_tiling(hidden, features), down_tiling(hidden, features)
    if gate_up.rows % (ROWS * gate_up.stage_items) or hidden % (gate_up.k_splits * WARPS * STEP):
        return (
            f"gate and up of {features} x {hidden} have no Hopper layout: rows must be a multiple of 16, columns of "
            f"{gate_up.k_splits * WARPS * STEP}"
        )
    if features % DOWN_SPAN or hidden % (ROWS * down.stage_items):
        return (
            f"down of {hidden} x {features} has no Hopper layout: columns must be a multiple of {DOWN_SPAN}, rows of "
            f"{ROWS * down.stage_items}"
        )
    reasons = (unfit_scales(name, stack) for name, stack in scales.items())
    return next(filter(None, reasons), None)


def unfit_scales(name: str, stack: Array | np.ndarray) -> str | None:
    """The same of E8M0 scales alone."""
    if (largest := int(stack.max())) <= LARGEST_SCALE:
        return None
    return (
        f"{name}: scale byte {largest} is above {LARGEST_SCALE} (a scale of 2), which backend 'mosaic_gpu' "
        "cannot serve; 'reference' and 'triton' can"
    )


def to_hopper(experts: PackedExperts) -> HopperExperts:
    """The same bits in another order; done once, at load. ValueError, naming the size, where there is no such order."""
    _, hidden, features = experts.sizes
    if (reason := unfit(hidden, features)) is not None:
        raise ValueError(reason)
    codes, scales = (alternate(gate, up) for gate, up in zip(experts.gate, experts.up))
    return HopperExperts(
        _to_stages(codes, scales, gate_up_tiling(hidden, features)),
        _to_stages(experts.down[0], experts.down[1], down_tiling(hidden, features)),
    )


def from_hopper(experts: HopperExperts) -> PackedExperts:
    """The inverse of `to_hopper`."""
    _, hidden, features = experts.sizes
    codes, scales = _from_stages(experts.gate_up, gate_up_tiling(hidden, features))
    pairs = [rows.reshape(rows.shape[0], features // 8, 2, 8, -1) for rows in (codes, scales)]
    gate, up = (tuple(rows[:, :, which].reshape(rows.shape[0], features, -1) for rows in pairs) for which in (0, 1))
    return PackedExperts(gate, up, _from_stages(experts.down, down_tiling(hidden, features)))


def _namespace(x: Any) -> ModuleType:
    return np if isinstance(x, np.ndarray) else jnp


def alternate(gate: Any, up: Any) -> Any:
    """Two [..., F, n] as one [..., 2 F, n]: rows 0-7 of gate, rows 0-7 of up, rows 8-15 of gate, and so on."""
    *stack, features, width = gate.shape
    both = [rows.reshape(*stack, features // 8, 1, 8, width) for rows in (gate, up)]
    return _namespace(gate).concatenate(both, axis=-3).reshape(*stack, 2 * features, width)


def bit_place(register: int, half: int, field: int) -> int:
    """Where a word keeps bit `field` (3: sign ... 0: mantissa) of the code of a register's half."""
    target = 16 * half + FIELDS[3 - field]
    is_apart = register == 3 and field == 0
    return (target - (LAST_MANTISSA if is_apart else ROTATIONS[register])) % 32


def _to_stages(codes: Any, scales: Any, tiling: Tiling) -> Any:
    """Codes [E, O, I/2] and scales [E, O, I/32] -> int32 [E, K splits, stages, words of a stage]."""
    xp, experts = _namespace(codes), codes.shape[0]
    blocks = (experts, tiling.rows // ROWS, 2, 8, tiling.cols // tiling.span)
    # columns of a tile: 64 at a time, blocks of 32, thread, step of the instruction, column pair, column
    elements = mxfp4.unpack(codes).reshape(*blocks, tiling.span // 64, 2, 4, 2, 2, 2).astype(np.uint32)
    words = 0
    for register in range(4):
        for half in range(2):
            code = elements[:, :, register % 2, ..., register // 2, half]
            for field in range(4):
                words = words | ((code >> field) & 1) << bit_place(register, half, field)
    # expert, row block, row, tile, 64, block, thread, step -> ... tile, 64, row, thread, block, step
    words = xp.transpose(words, (0, 1, 3, 4, 2, 6, 5, 7)).reshape(experts, blocks[1], blocks[4], -1)
    stored = (scales.astype(np.uint32) + SCALE_OFFSET & 255).reshape(*blocks, tiling.span // STEP, 2, 2)
    # expert, row block, half, row, tile, 128, 64, block -> ... tile, 128, row, 64, (block, half): four bytes a word
    stored = xp.transpose(stored, (0, 1, 4, 5, 3, 6, 7, 2)).reshape(experts, blocks[1], blocks[4], -1, 4)
    stored = stored[..., 0] | stored[..., 1] << 8 | stored[..., 2] << 16 | stored[..., 3] << 24
    return _group_tiles(xp.concatenate([words, stored], axis=-1).view(np.int32), tiling)


def _from_stages(stages: Any, tiling: Tiling) -> tuple[Any, Any]:
    xp, experts = _namespace(stages), stages.shape[0]
    blocks, across = tiling.rows // ROWS, tiling.cols // tiling.span
    tiles = _ungroup_tiles(stages, tiling).view(np.uint32)
    words = tiles[..., : 2 * tiling.span].reshape(experts, blocks, across, tiling.span // 64, 8, 4, 2, 2)
    halves = []
    for register in range(4):
        codes = [sum((words >> bit_place(register, half, f) & 1) << f for f in range(4)) for half in range(2)]
        halves.append(xp.stack(codes, axis=-1).astype(np.uint8))
    # expert, block, tile, 64, row, thread, block, step, (column pair, row half), column
    elements = xp.stack(halves, axis=-2).reshape(experts, blocks, across, tiling.span // 64, 8, 4, 2, 2, 2, 2, 2)
    elements = xp.transpose(elements, (0, 1, 9, 4, 2, 3, 6, 5, 7, 8, 10)).reshape(experts, tiling.rows, tiling.cols)
    stored = tiles[..., 2 * tiling.span :].reshape(experts, blocks, across, tiling.span // STEP, 8, 2)
    stored = xp.stack([stored >> shift & 255 for shift in (0, 8, 16, 24)], axis=-1)
    stored = stored.reshape(*stored.shape[:-1], 2, 2)  # expert, block, tile, 128, row, 64, block, half
    stored = xp.transpose(stored, (0, 1, 7, 4, 2, 3, 5, 6)).reshape(experts, tiling.rows, tiling.cols // mxfp4.BLOCK)
    return mxfp4.pack(elements), (stored - SCALE_OFFSET & 255).astype(np.uint8)


def _group_tiles(tiles: Any, tiling: Tiling) -> Any:
    """[E, row blocks, tiles across, words] -> [E, K splits, stages, words of a stage]."""
    experts, xp = tiles.shape[0], _namespace(tiles)
    tiles = tiles.reshape(
        experts, tiling.stages, tiling.stage_items, tiling.k_splits, tiling.item_tiles, tiling.tile_words
    )
    stages = xp.transpose(tiles, (0, 3, 1, 2, 4, 5))
    stages = stages.reshape(experts, tiling.k_splits, tiling.stages, tiling.stage_words)
    return np.ascontiguousarray(stages) if xp is np else stages


def _ungroup_tiles(stages: Any, tiling: Tiling) -> Any:
    experts, xp = stages.shape[0], _namespace(stages)
    tiles = stages.reshape(
        experts, tiling.k_splits, tiling.stages, tiling.stage_items, tiling.item_tiles, tiling.tile_words
    )
    tiles = xp.transpose(tiles, (0, 2, 3, 1, 4, 5))
    return tiles.reshape(experts, tiling.rows // ROWS, tiling.cols // tiling.span, tiling.tile_words)
