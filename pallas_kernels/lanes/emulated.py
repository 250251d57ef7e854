"""Tiles run by NumPy, all threads of a warpgroup at once; what a GPU would not forgive is an error."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pallas_kernels.lanes.values import BOOL, F32, I32, WARP, WARPGROUP, Lanes, Memory, Value, half_type

TYPES = {I32: np.int32, F32: np.float32, BOOL: np.bool_}


class TileError(Exception):
    """What a GPU would do something undefined with."""


class _Buffer:
    """A NumPy array in 4-byte elements, and who touched each of them since the last barrier."""

    def __init__(self, array: np.ndarray) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("a buffer has to be contiguous")
        self.words = array.reshape(-1).view(np.int32)
        self.writer, self.reader = (np.full(self.words.size, -1, np.int16) for _ in range(2))

    def forget(self) -> None:
        self.writer.fill(-1), self.reader.fill(-1)


SEVERAL = -2  # threads
SHAPE = (WARPGROUP,)  # of what all threads hold


class Emulated(Lanes):
    """See `Lanes`."""

    def __init__(self, counts_conflicts: bool = False) -> None:
        self.counts_conflicts, self.buffers = counts_conflicts, list[_Buffer]()
        self.active = np.ones(WARPGROUP, bool)
        self.thread = Value(self, I32, np.arange(WARPGROUP, dtype=np.int32))
        self.state: list[np.ndarray] = []  # that a tile has returned
        self.instructions = 0
        self.conflicts = 0  # by which loads and stores of 4-byte banks take longer than they had to; if counted

    def memory(self, array: np.ndarray) -> Memory:
        self.buffers.append(_Buffer(array))
        return Memory(self.buffers[-1])

    def _new(self, kind: str, held: Any) -> Value:
        self.instructions += 1
        held = np.asarray(held, TYPES[kind])
        return Value(self, kind, held if held.shape == SHAPE else np.broadcast_to(held, SHAPE))

    def constant(self, number: float, kind: str) -> Value:
        """An integer may be signed or not."""
        held = np.array(number, np.int64).astype(np.int32) if kind == I32 else number
        return Value(self, kind, np.full(WARPGROUP, held, TYPES[kind]))

    def binary(self, name: str, a: Value, b: Value) -> Value:
        kind = BOOL if name in COMPARISONS else a.kind
        if name in COMPARISONS:
            return self._new(kind, COMPARISONS[name](a.held, b.held))
        if a.kind == I32 and name in UNSIGNED:
            found = UNSIGNED[name](a.held.view(np.uint32), b.held.view(np.uint32)).astype(np.uint32).view(np.int32)
            return self._new(kind, found)
        with np.errstate(all="ignore"):
            return self._new(kind, OPERATIONS[name](a.held, b.held))

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return self._new(a.kind, np.where(condition.held, a.held, b.held))

    def bitcast(self, value: Value, kind: str) -> Value:
        return Value(self, kind, np.ascontiguousarray(value.held).view(TYPES[kind]))

    def _places(self, memory: Memory, index: Value, count: int) -> tuple[_Buffer, np.ndarray, np.ndarray]:
        """The buffer, and the elements [threads, count] of the active threads."""
        buffer, threads = memory.base, np.flatnonzero(self.active)
        first = index.held[threads].astype(np.int64)
        if (first % count).any():
            raise TileError(f"an access of {count} elements at {first[first % count != 0][0]} is not aligned")
        places = first[:, None] + np.arange(count)
        if places.size and not (0 <= places.min() and places.max() < buffer.words.size):
            raise TileError(f"elements {places.min()} to {places.max()} of a buffer of {buffer.words.size}")
        if self.counts_conflicts:
            self._count_conflicts(places, threads, count)
        return buffer, places, threads

    def _count_conflicts(self, places: np.ndarray, threads: np.ndarray, count: int) -> None:
        """A quarter, a half or all of a warp goes at once, by the bytes of each thread."""
        together = WARP // count
        for number in np.unique(threads // together):
            words = np.unique(places[threads // together == number])
            self.conflicts += int(np.bincount(words % WARP).max()) - 1 if words.size else 0

    def load(self, memory: Memory, index: Value, kind: str = F32, count: int = 1) -> list[Value]:
        buffer, places, threads = self._places(memory, index, count)
        writer = buffer.writer[places]
        if ((writer != -1) & (writer != threads[:, None])).any():
            raise TileError("a thread reads what another one has written since the last barrier")
        _mark(buffer.reader, places, threads)
        values = np.zeros((WARPGROUP, count), np.int32)
        values[threads] = buffer.words[places]
        return [self._new(kind, np.ascontiguousarray(values[:, i]).view(TYPES[kind])) for i in range(count)]

    def store(self, values: Sequence[Value], memory: Memory, index: Value) -> None:
        buffer, places, threads = self._places(memory, index, len(values))
        if np.unique(places).size != places.size:
            raise TileError("two threads write the same element")
        for owners in (buffer.writer, buffer.reader):
            found = owners[places]
            if ((found != -1) & (found != threads[:, None])).any():
                raise TileError("a thread overwrites what another one has read or written since the last barrier")
        buffer.writer[places] = threads[:, None]
        words = np.stack([np.ascontiguousarray(value.held).view(np.int32) for value in values], axis=1)
        buffer.words[places] = words[threads]
        self.instructions += 1

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        outer, self.active = self.active, self.active & condition.held
        yield
        self.active = outer

    def loop(self, first: Any, last: Any, step: int, body: Callable[..., Sequence[Value]], carried: Sequence[Value]):
        bounds = []
        for bound in (first, last):
            held = self.value(bound, I32).held[self.active]
            if held.size and (held != held[0]).any():
                raise TileError("threads differ in a loop's bounds")
            bounds.append(int(held[0]) if held.size else 0)
        start, end = bounds
        for index in range(start, end, step):
            carried = body(self.constant(index, I32), *carried)
        return list(carried)

    def branch(self, condition: Value, body: Callable[..., Sequence[Value]], carried: Sequence[Value]) -> list[Value]:
        with self.when(condition):
            self._check_warps("a branch")
            found = body(*carried)
        return [self.select(condition, new, old) for new, old in zip(found, carried, strict=True)]

    def _check_warps(self, what: str) -> None:
        if (self.active.reshape(-1, WARP) != self.active[::WARP, None]).any():
            raise TileError(f"{what} that not all threads of a warp take part in")

    def load_matrices(self, memory: Memory, index: Value, offset: int = 0, transposed: bool = False) -> list[Value]:
        self._check_warps("a load of matrices")
        rows = np.stack([value.held for value in self.load(memory, index + offset, I32, 4)], axis=1)
        halves = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, 4, 8, 8)  # warp, matrix, row, column
        pairs = np.ascontiguousarray(halves.transpose(0, 1, 3, 2) if transposed else halves).view(np.int32)
        return [self._new(I32, pairs[:, matrix].reshape(WARPGROUP)) for matrix in range(4)]

    def mma(self, a: Sequence[Value], b: Sequence[Value], sums: Sequence[Value], kind: str = "bf16") -> list[Value]:
        """A[row, k] and B[k, n] gathered from the registers of each warp's threads (PTX ISA, m16n8k16)."""
        self._check_warps("a product")
        a_wRK = _gather(a, kind, np.zeros((4, 16, 16), np.float64), PLACES_A)
        b_wNK = _gather(b, kind, np.zeros((4, 8, 16), np.float64), PLACES_B)
        with np.errstate(all="ignore"):
            found = a_wRK @ b_wNK.transpose(0, 2, 1)
        return [self._new(F32, found[place] + before.held) for place, before in zip(PLACES_C, sums)]

    def shuffle(self, value: Value, by: int) -> Value:
        return self._new(value.kind, value.held[np.arange(WARPGROUP) ^ by])

    def asm(self, text, inputs, kinds, twin, volatile: bool = False) -> list[Value]:
        with np.errstate(all="ignore"):
            found = twin(*(np.ascontiguousarray(value.held) for value in inputs))
        return [self._new(kind, held) for kind, held in zip(kinds, found if len(kinds) > 1 else (found,), strict=True)]

    def barrier(self) -> None:
        if not self.active.all():
            raise TileError("a barrier that not all threads reach")
        for buffer in self.buffers:
            buffer.forget()


COMPARISONS = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq")}
UNSIGNED = {
    "div": operator.floordiv,
    "rem": operator.mod,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": operator.lshift,
    "shr": operator.rshift,
}
OPERATIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "max": np.maximum,
    "min": np.minimum,
    "and": operator.and_,
    "or": operator.or_,
}


def _mark(owners: np.ndarray, places: np.ndarray, mine: np.ndarray) -> None:
    """Notes who reads: one, or SEVERAL."""
    mine = np.broadcast_to(mine[:, None], places.shape)
    first = np.full(owners.size, -1, np.int16)
    first[places] = mine
    several = np.zeros(owners.size, bool)
    several[places[first[places] != mine]] = True
    before = owners[places]
    owners[places] = np.where((before == -1) | (before == mine), mine, SEVERAL)
    owners[several] = SEVERAL


# Where each thread's numbers belong, by register and half (PTX ISA, m16n8k16): warp, row, column.
_WARP, _GROUP, _QUAD = (np.arange(WARPGROUP) // by % of for by, of in ((WARP, 4), (4, 8), (1, 4)))
PLACES_A = [
    (_WARP, _GROUP + 8 * (register % 2), 2 * _QUAD + 8 * (register // 2) + half)
    for register in range(4)
    for half in range(2)
]
PLACES_B = [(_WARP, _GROUP, 2 * _QUAD + 8 * register + half) for register in range(2) for half in range(2)]
PLACES_C = [(_WARP, _GROUP + 8 * (number // 2), 2 * _QUAD + number % 2) for number in range(4)]


def _gather(registers: Sequence[Value], kind: str, out: np.ndarray, places: list[tuple]) -> np.ndarray:
    halves = [np.ascontiguousarray(register.held).view(np.uint16).reshape(WARPGROUP, 2) for register in registers]
    for number, place in enumerate(places):
        out[place] = NUMBERS[kind][halves[number // 2][:, number % 2]]
    return out


def _numbers(kind: str) -> np.ndarray:
    """Of all bit patterns."""
    with np.errstate(invalid="ignore"):
        return np.arange(1 << 16, dtype=np.uint16).view(half_type(kind)).astype(np.float64)


# A thread of XLA's would take those that are denormal in float32 for zeros, as tensor cores do not.
NUMBERS = {kind: _numbers(kind) for kind in ("bf16", "f16")}


def run(
    tile: Callable[..., Any],
    arrays: Sequence[np.ndarray],
    scalars: Mapping[str, int] = {},
    lanes: Emulated | None = None,
    state: Sequence[np.ndarray | float] | None = None,
) -> Emulated:
    """Runs a tile once on one warpgroup; arrays are changed in place. Returns the lanes, for what they counted.

    A `state`, of each value f32 [128] or a number for all threads, is the tile's fourth argument; what the tile returns
    is left in the lanes.
    """
    lanes = lanes or Emulated()
    memories = [lanes.memory(array) for array in arrays]
    values = {name: lanes.constant(number, I32) for name, number in scalars.items()}
    if state is None:
        tile(lanes, memories, values)
    else:
        lanes.state = [value.held for value in tile(lanes, memories, values, [lanes._new(F32, held) for held in state])]
    return lanes
