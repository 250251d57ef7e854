"""How native code keeps weights: one array of bytes, and a directory of what lies where in it.

Matrices keep the bits of their file format, rearranged: 16 output rows lie side by side, one per vector lane, so that
no sum crosses lanes. Rows and columns are padded with zeros to whole blocks.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

LANES = 16  # rows of a block, whatever the machine
GROUP = 32  # columns whose sum is scaled at once; also the block of MXFP4
FP8_BLOCK = 128  # columns that share a scale
ALIGNMENT = 64  # bytes, of every array

TOP_SLOTS = ("embed", "head", "norm", "global_frequencies", "sliding_frequencies")
LAYER_SLOTS = ("input_norm", "qkv", "output", "sink", "post_norm", "gate_up", "down", "router", "router_bias")
DRAFT_TOP_SLOTS = (
    *("fuse", "context_norm", "norm", "mask", "bias_in", "bias_out", "guess", "matched"),
    *("context_frequencies", "block_frequencies"),
)
DRAFT_LAYER_SLOTS = ("input_norm", "qkv", "output", "sink", "post_norm", "gate_up", "down", "q_norm", "k_norm")


class Format(enum.IntEnum):
    """How a matrix keeps its weights; native code is compiled with these numbers."""

    F32 = 0
    BF16 = 1
    FP8 = 2
    MXFP4 = 3


@dataclasses.dataclass(frozen=True)
class Stored:
    """A matrix [O, I], or a stack of them, as its file stores it: plain values, or codes with scales.

    Scales are uint8 [*, O, I/32] beside MXFP4 codes [*, O, I/2], float32 [*, O, I/128] beside FP8 codes.
    """

    values: np.ndarray
    scales: np.ndarray | None = None

    @property
    def format(self) -> Format:
        return FORMATS[self.values.dtype.name]

    @property
    def cols(self) -> int:
        return self.values.shape[-1] * (2 if self.format == Format.MXFP4 else 1)

    def merged(self) -> Stored:
        """A stack of matrices as one, each below the one before."""
        scales = self.scales
        merged = None if scales is None else scales.reshape(-1, scales.shape[-1])
        return Stored(self.values.reshape(-1, self.values.shape[-1]), merged)


def stored_fp8(codes: np.ndarray, scales: np.ndarray) -> Stored:
    """FP8 codes [*, O, I] whose scales [*, O/128, I/128] are one for each block of 128 rows and columns."""
    return Stored(codes, np.repeat(scales, FP8_BLOCK, axis=-2)[..., : codes.shape[-2], :])


def joined(*parts: Stored) -> Stored:
    """Matrices of one format, each below the one before."""
    scales = [part.scales for part in parts if part.scales is not None]
    values = np.concatenate([part.values for part in parts], axis=-2)
    return Stored(values, np.concatenate(scales, axis=-2) if scales else None)


FORMATS = {
    "float32": Format.F32,
    "bfloat16": Format.BF16,
    "float8_e4m3fn": Format.FP8,
    "uint8": Format.MXFP4,
}
# What of a row one lane holds at a time: a 32-bit word, of FP8 a byte.
_WORDS = {Format.F32: "<u4", Format.BF16: "<u4", Format.FP8: "u1", Format.MXFP4: "<u4"}


def _padded(array: np.ndarray, axis: int, multiple: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis % array.ndim] = (0, -array.shape[axis] % multiple)
    return np.pad(array, widths) if any(after for _, after in widths) else array


# Within each 8 columns, inputs and weights lie in this order: a shift then brings the codes of two columns to the ends
# of their 16-bit words, where a machine that multiplies pairs needs them. MXFP4 needs no change for that.
ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])


def _ordered(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Columns in `order` within each 8."""
    eights = values.reshape(*values.shape[:-1], -1, 8)
    return eights[..., order].reshape(values.shape)


def blocked(stored: Stored) -> tuple[np.ndarray, np.ndarray | None]:
    """The words of a matrix as [*, blocks, words of a row, 16 rows], and its scales as [*, blocks, groups, 16 rows]."""
    values = _padded(_padded(stored.values, -2, LANES), -1, GROUP * stored.values.shape[-1] // stored.cols)
    if stored.format != Format.MXFP4:
        values = _ordered(values, ORDER)
    words = np.ascontiguousarray(values).view(_WORDS[stored.format])
    return _lanes_last(words), _blocked_scales(stored)


def _lanes_last(words: np.ndarray) -> np.ndarray:
    """[*, O, I] -> [*, O/16, I, 16]."""
    shape = (*words.shape[:-2], words.shape[-2] // LANES, LANES, words.shape[-1])
    return np.ascontiguousarray(np.swapaxes(words.reshape(shape), -1, -2))


def _blocked_scales(stored: Stored) -> np.ndarray | None:
    if stored.scales is None:
        return None
    # Native code widens E4M3 as float16, whose exponents are 8 smaller.
    scales = stored.scales.astype(np.float32) * np.float32(256) if stored.format == Format.FP8 else stored.scales
    return _lanes_last(_padded(scales, -2, LANES))


def unblocked(stored: Stored, words: np.ndarray) -> np.ndarray:
    """The values of `stored` from its words: the inverse of `blocked`."""
    rows = np.swapaxes(words, -1, -2).reshape(*words.shape[:-3], -1, words.shape[-2])
    values = np.ascontiguousarray(rows).view(stored.values.dtype)
    if stored.format != Format.MXFP4:
        values = _ordered(values, np.argsort(ORDER))
    return values[..., : stored.values.shape[-2], : stored.values.shape[-1]]


class Blob:
    """Collects arrays under slots and lays them one after the other."""

    def __init__(self, slots: int) -> None:
        self.directory = np.zeros((slots, 5), np.int32)
        self._parts: list[np.ndarray] = []
        self._used = 0

    def _append(self, array: np.ndarray) -> int:
        """The place of an array's bytes, in units of ALIGNMENT."""
        at = self._used // ALIGNMENT
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self._parts += [data, np.zeros(-data.size % ALIGNMENT, np.uint8)]
        self._used += data.size + self._parts[-1].size
        return at

    def add_table(self, slot: int, rows: np.ndarray) -> None:
        """A table whose rows are looked up: as it is."""
        self.directory[slot] = (self._append(rows), 0, FORMATS[rows.dtype.name], *rows.shape)

    def add_vector(self, slot: int, vector: Any) -> None:
        """A vector, in float32."""
        values = np.asarray(vector, np.float32)
        self.directory[slot] = (self._append(values), 0, Format.F32, 1, values.size)

    def add_matrix(self, slot: int, stored: Stored) -> None:
        """A matrix, or a stack of equal ones."""
        self._add_blocks(slot, blocked(stored), stored.values.shape[-2], stored)

    def add_alternating(self, slot: int, gate: Stored, up: Stored) -> None:
        """Two matrices, or stacks of them, whose blocks of 16 rows alternate: their outputs are needed together."""
        (gate_words, gate_scales), (up_words, up_scales) = blocked(gate), blocked(up)
        words, scales = _alternated(gate_words, up_words), None
        if gate_scales is not None and up_scales is not None:
            scales = _alternated(gate_scales, up_scales)
        self._add_blocks(slot, (words, scales), words.shape[-3] * LANES, gate)

    def _add_blocks(self, slot: int, blocks: tuple[np.ndarray, np.ndarray | None], rows: int, stored: Stored) -> None:
        words, scales = blocks
        places = (self._append(words), 0 if scales is None else self._append(scales))
        self.directory[slot] = (*places, stored.format, rows, stored.cols)

    def finish(self) -> tuple[UInt8[np.ndarray, "bytes"], Int32[np.ndarray, "slots 5"]]:
        """All bytes, and where each slot's lie: data, scales (in units of 64 bytes), format, rows, columns."""
        return np.concatenate(self._parts), self.directory


def _alternated(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    together = np.stack([first, second], axis=-3)
    return together.reshape(*together.shape[:-4], -1, *together.shape[-2:])
