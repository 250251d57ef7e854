"""Weight matrices as the ring's slots hold them: tiles of 16 rows, each thread's operands 16 bytes side by side.

A tile is what one warp multiplies at a time: 16 rows by a quarter of a chunk, or by all columns of an expert's down.
Its words are the A operands of `mma.m16n8k16`, its scales follow them. 32 columns feed two instructions; thread t of a
quad holds columns 8t to 8t + 7 of them, the first four for the first. So inputs stay in their natural order, and
a thread reads its B operands of both with one load of 16 bytes.

    bf16    [cols/32, instruction, row g, t, register] words of two columns
    fp8     [cols/32, row g, t, instruction, pair of registers] words of two rows (g, g + 8) by two columns
            [cols/64, row g, half] scales float32, over what the inputs are multiplied by
    mxfp4   [cols/64, row g, t, 32 columns, instruction] words, [cols/128, row g, 64 columns] scales of four blocks:
            codes as in `hopper_layout`; a scale's byte is the exponent of a float32 that makes a product of what was
            decoded and of what inputs are the product of weights and stream

Registers 0 to 3 are rows g and g + 8 of two columns, then of the next two. Every function takes numpy or JAX arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import mxfp4
from pallas_kernels.decode_step.hopper.config import FP8_SEGMENT, GAINS, INPUT_SHIFT, ROWS, Matrix, code_words
from pallas_kernels.expert_matmul import hopper_layout

SCALE_COLS = {"mxfp4": mxfp4.BLOCK, "fp8": FP8_SEGMENT}
NEUTRAL = {"mxfp4": 127, "fp8": 1}  # scales of one, for columns and rows that are padding
FP8_SCALE = 2.0 ** -INPUT_SHIFT["fp8"]  # of a stored scale, times that of the weights
SCALE_OFFSET = 126 - INPUT_SHIFT["mxfp4"]  # of a stored exponent, above E8M0
LARGEST_SCALE = 254 - SCALE_OFFSET  # E8M0 byte, whose exponent float32 has
assert sys.byteorder == "little"  # the first of several numbers lies in the low bits of a word


def pack(matrix: Matrix, weights: Any, scales: Any = None) -> Any:
    """One matrix or a stack -> int32 [..., row_blocks, chunks, slot_words]; rows and columns are padded with zeros.

    bf16: weights [..., O, I]. fp8: e4m3 codes [..., O, I] (uint8 or float8_e4m3fn), scales float32 [..., O, I/64].
    mxfp4: codes uint8 [..., O, I/2], E8M0 scales uint8 [..., O, I/32], none above LARGEST_SCALE.
    """
    words = _pack(matrix.format, weights, scales, matrix.row_blocks, matrix.cols, matrix.warp_cols)
    return words.reshape(*words.shape[:-2], matrix.columns.chunks, matrix.slot_words)


def unpack(matrix: Matrix, words: Any) -> tuple[Any, Any]:
    """The inverse of `pack`, with the padding: weights (e4m3 as uint8) and scales, or None."""
    tiles = words.reshape(*words.shape[:-2], matrix.cols // matrix.warp_cols, -1)
    return _unpack(matrix.format, tiles, matrix.warp_cols)


def scale_word(format: str, exponent: int) -> int:
    """A word of stored scales of 2**exponent."""
    if format == "fp8":
        return int(np.float32(2.0**exponent * FP8_SCALE).view(np.int32))
    return int((np.full(4, 127 + exponent + SCALE_OFFSET) & 255).astype(np.uint8).view(np.int32)[0])


def pack_down(codes: Any, scales: Any) -> Any:
    """Codes uint8 [E, O, I/2], scales uint8 [E, O, I/32] of MXFP4 -> int32 [E, row_blocks, words], tiles of all I."""
    cols = 2 * codes.shape[-1]
    return _pack("mxfp4", codes, scales, -(-codes.shape[-2] // ROWS), cols, cols)[..., 0, :]


def unpack_down(words: Any) -> tuple[Any, Any]:
    """The inverse of `pack_down`."""
    return _unpack("mxfp4", words[..., None, :], words.shape[-1] * 8 // 17)


def pack_gains(norms: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [D] each -> int32, one after the other; copies of a CTA's own columns may reach beyond the last one."""
    return np.concatenate([*norms, np.zeros(GAINS, np.float32)]).view(np.int32)


def _pack(format: str, weights: Any, scales: Any, row_blocks: int, cols: int, tile_cols: int) -> Any:
    """[..., row_blocks, tiles of a row block, tile_words]."""
    if format == "bf16":
        return _bf16_words(_operands(_tiles(_bits(weights, np.uint16), 0, row_blocks, cols, tile_cols)))
    rows_of = mxfp4.unpack(weights) if format == "mxfp4" else _bits(weights, np.uint8)
    operands = _operands(_tiles(rows_of, 0, row_blocks, cols, tile_cols))
    per = SCALE_COLS[format]
    tiled = _tiles(scales, NEUTRAL[format], row_blocks, cols // per, tile_cols // per)
    words = {"mxfp4": _mxfp4_words, "fp8": _fp8_words}[format](operands)
    stored = {"mxfp4": _mxfp4_scales, "fp8": _fp8_scales}[format](tiled)
    return _namespace(words).concatenate([words, stored], axis=-1)


def _unpack(format: str, tiles: Any, tile_cols: int) -> tuple[Any, Any]:
    split = code_words(format, tile_cols)
    words, stored = tiles[..., :split], tiles[..., split:]
    if format == "bf16":
        return _bits(_rows(_columns(_bf16_operands(words))), jnp.bfloat16), None
    weights = _rows(_columns({"mxfp4": _mxfp4_operands, "fp8": _fp8_operands}[format](words)))
    scales = _rows({"mxfp4": _mxfp4_scales_back, "fp8": _fp8_scales_back}[format](stored))
    return mxfp4.pack(weights) if format == "mxfp4" else weights, scales


def _namespace(x: Any) -> ModuleType:
    return np if isinstance(x, np.ndarray) else jnp


def _bits(x: Any, dtype: Any) -> Any:
    """The same bits as other numbers; the last axis shrinks or grows."""
    return np.ascontiguousarray(x).view(dtype) if isinstance(x, np.ndarray) else x.view(dtype)


def _tiles(x: Any, filler: int, row_blocks: int, cols: int, tile_cols: int) -> Any:
    """[..., O, I] -> [..., row_blocks, tiles, 16, tile_cols]."""
    xp, (rows, given) = _namespace(x), x.shape[-2:]
    missing = [(0, 0)] * (x.ndim - 2) + [(0, row_blocks * ROWS - rows), (0, cols - given)]
    whole = xp.pad(x, missing, constant_values=filler).reshape(*x.shape[:-2], row_blocks, ROWS, -1, tile_cols)
    return xp.swapaxes(whole, -2, -3)


def _rows(tiles: Any) -> Any:
    """The inverse of `_tiles`, padding included."""
    *stack, row_blocks, across, rows, cols = tiles.shape
    return _namespace(tiles).swapaxes(tiles, -2, -3).reshape(*stack, row_blocks * rows, across * cols)


def _reordered(x: Any, *axes: int) -> Any:
    """The last axes in another order, numbered from their first."""
    first = x.ndim - len(axes)
    return _namespace(x).transpose(x, (*range(first), *(first + axis for axis in axes)))


def _operands(tiles: Any) -> Any:
    """[..., 16, cols] -> [..., cols/32, row g, t, instruction, column pair, half of the rows, column]."""
    return _reordered(tiles.reshape(*tiles.shape[:-2], 2, 8, -1, 4, 2, 2, 2), 2, 1, 3, 4, 5, 0, 6)


def _columns(operands: Any) -> Any:
    """The inverse of `_operands`."""
    tiles = _reordered(operands, 5, 1, 0, 2, 3, 4, 6)
    return tiles.reshape(*tiles.shape[:-7], ROWS, -1)


def _bf16_words(operands: Any) -> Any:
    by_instruction = _reordered(operands, 0, 3, 1, 2, 4, 5, 6)
    return _bits(by_instruction.reshape(*operands.shape[:-7], -1), np.int32)


def _bf16_operands(words: Any) -> Any:
    return _reordered(_bits(words, np.uint16).reshape(*words.shape[:-1], -1, 2, 8, 4, 2, 2, 2), 0, 2, 3, 1, 4, 5, 6)


def _fp8_words(operands: Any) -> Any:
    return _bits(operands.reshape(*operands.shape[:-7], -1), np.int32)


def _fp8_operands(words: Any) -> Any:
    return _bits(words, np.uint8).reshape(*words.shape[:-1], -1, 8, 4, 2, 2, 2, 2)


def _fp8_scales(scales: Any) -> Any:
    """[..., 16, cols/64] -> [..., cols/64 * 16] words."""
    stored = scales.astype(np.float32) * np.float32(FP8_SCALE)
    stored = _reordered(stored.reshape(*stored.shape[:-2], 2, 8, -1), 2, 1, 0)
    return _bits(stored.reshape(*stored.shape[:-3], -1), np.int32)


def _fp8_scales_back(stored: Any) -> Any:
    scales = _bits(stored, np.float32).reshape(*stored.shape[:-1], -1, 8, 2) * np.float32(1 / FP8_SCALE)
    scales = _reordered(scales, 2, 1, 0)
    return scales.reshape(*scales.shape[:-3], ROWS, -1)


def _mxfp4_words(operands: Any) -> Any:
    words: Any = 0
    for pair in range(2):
        for rows in range(2):
            for column in range(2):
                code = operands[..., pair, rows, column].astype(np.uint32)
                for field in range(4):
                    words = words | ((code >> field) & 1) << hopper_layout.bit_place(2 * pair + rows, column, field)
    words = _reordered(words.reshape(*words.shape[:-4], -1, 2, 8, 4, 2), 0, 2, 3, 1, 4)
    return _bits(words.reshape(*words.shape[:-5], -1), np.int32)


def _mxfp4_operands(words: Any) -> Any:
    words = _reordered(_bits(words, np.uint32).reshape(*words.shape[:-1], -1, 8, 4, 2, 2), 0, 3, 1, 2, 4)
    words = words.reshape(*words.shape[:-5], -1, 8, 4, 2)
    codes = []
    for register in range(4):
        for column in range(2):
            places = [hopper_layout.bit_place(register, column, field) for field in range(4)]
            codes.append(sum((words >> place & 1) << field for field, place in enumerate(places)))
    return _namespace(words).stack(codes, axis=-1).astype(np.uint8).reshape(*words.shape, 2, 2, 2)


def _mxfp4_scales(scales: Any) -> Any:
    """[..., 16, cols/32] -> [..., cols/8] words, each of two blocks of rows g and g + 8."""
    stored = (scales.astype(np.uint32) + SCALE_OFFSET & 255).astype(np.uint8)
    stored = _reordered(stored.reshape(*stored.shape[:-2], 2, 8, -1, 2, 2), 2, 1, 3, 4, 0)
    return _bits(stored.reshape(*stored.shape[:-5], -1), np.int32)


def _mxfp4_scales_back(stored: Any) -> Any:
    scales = _reordered(_bits(stored, np.uint8).reshape(*stored.shape[:-1], -1, 8, 2, 2, 2), 4, 1, 0, 2, 3)
    scales = scales.reshape(*scales.shape[:-5], ROWS, -1).astype(np.uint32)
    return (scales - SCALE_OFFSET & 255).astype(np.uint8)
