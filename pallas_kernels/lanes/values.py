"""The operations of a thread, and values with Python's operators."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

WARP, WARPGROUP = 32, 128  # threads
I32, F32, BOOL = "i32", "f32", "bool"


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A number of each thread: 32 bits as an integer or as a float, or a truth value.

    Integers wrap around; `//`, `%` and `>>` take them as unsigned, comparisons as signed.
    """

    lanes: Lanes
    kind: str
    held: Any

    def _with(self, name: str, other: Any, is_swapped: bool = False) -> Value:
        other = self.lanes.value(other, self.kind)
        return self.lanes.binary(name, *((other, self) if is_swapped else (self, other)))

    def __add__(self, other: Any) -> Value:
        return self._with("add", other)

    def __radd__(self, other: Any) -> Value:
        return self._with("add", other, True)

    def __sub__(self, other: Any) -> Value:
        return self._with("sub", other)

    def __rsub__(self, other: Any) -> Value:
        return self._with("sub", other, True)

    def __mul__(self, other: Any) -> Value:
        return self._with("mul", other)

    def __rmul__(self, other: Any) -> Value:
        return self._with("mul", other, True)

    def __truediv__(self, other: Any) -> Value:
        return self._with("div", other)

    def __rtruediv__(self, other: Any) -> Value:
        return self._with("div", other, True)

    def __floordiv__(self, other: Any) -> Value:
        return self._with("div", other)

    def __mod__(self, other: Any) -> Value:
        return self._with("rem", other)

    def __and__(self, other: Any) -> Value:
        return self._with("and", other)

    def __or__(self, other: Any) -> Value:
        return self._with("or", other)

    def __xor__(self, other: Any) -> Value:
        return self._with("xor", other)

    def __lshift__(self, other: Any) -> Value:
        return self._with("shl", other)

    def __rshift__(self, other: Any) -> Value:
        return self._with("shr", other)

    def __lt__(self, other: Any) -> Value:
        return self._with("lt", other)

    def __le__(self, other: Any) -> Value:
        return self._with("le", other)

    def __gt__(self, other: Any) -> Value:
        return self._with("gt", other)

    def __ge__(self, other: Any) -> Value:
        return self._with("ge", other)

    def equals(self, other: Any) -> Value:
        return self._with("eq", other)

    def maximum(self, other: Any) -> Value:
        """A NaN among floats stays one."""
        return self._with("max", other)

    def minimum(self, other: Any) -> Value:
        return self._with("min", other)

    def as_float(self) -> Value:
        """The same bits."""
        return self.lanes.bitcast(self, F32)

    def as_int(self) -> Value:
        return self.lanes.bitcast(self, I32)


@dataclasses.dataclass(frozen=True)
class Memory:
    """A buffer in shared or global memory; `base` is whatever the implementation addresses it by."""

    base: Any


class Lanes(abc.ABC):
    """What a thread of a warpgroup can do. Kinds are "i32", "f32" and "bool"."""

    thread: Value  # 0 to 127

    @property
    def warp(self) -> Value:
        return self.thread // WARP

    @property
    def lane(self) -> Value:
        return self.thread % WARP

    def value(self, number: Any, kind: str) -> Value:
        """A constant of this kind, or the value itself, whose kind has to be this one."""
        if not isinstance(number, Value):
            return self.constant(number, kind)
        if number.kind != kind:
            raise TypeError(f"a value of kind {number.kind} where {kind} is needed")
        return number

    @abc.abstractmethod
    def constant(self, number: float, kind: str) -> Value: ...

    @abc.abstractmethod
    def binary(self, name: str, a: Value, b: Value) -> Value: ...

    @abc.abstractmethod
    def select(self, condition: Value, a: Value, b: Value) -> Value: ...

    @abc.abstractmethod
    def bitcast(self, value: Value, kind: str) -> Value: ...

    @abc.abstractmethod
    def load(self, memory: Memory, index: Value, kind: str = F32, count: int = 1) -> list[Value]:
        """`count` neighbours from element `index` of 4 bytes on; aligned to all of them."""

    @abc.abstractmethod
    def store(self, values: Sequence[Value], memory: Memory, index: Value) -> None: ...

    @abc.abstractmethod
    def when(self, condition: Value) -> AbstractContextManager[None]:
        """What is inside happens in threads for which the condition holds; values made inside stay there."""

    @abc.abstractmethod
    def loop(
        self, first: Any, last: Any, step: int, body: Callable[..., Sequence[Value]], carried: Sequence[Value]
    ) -> list[Value]:
        """`carried = body(index, *carried)` for each index; the bounds are the same in all threads."""

    @abc.abstractmethod
    def branch(self, condition: Value, body: Callable[..., Sequence[Value]], carried: Sequence[Value]) -> list[Value]:
        """`body(*carried)` where the condition, the same in all threads of a warp, holds; elsewhere what is carried."""

    @abc.abstractmethod
    def load_matrices(self, memory: Memory, index: Value, offset: int = 0, transposed: bool = False) -> list[Value]:
        """`ldmatrix.x4` from shared memory: four 8 x 8 matrices of 16-bit numbers, a register of a warp for each.

        Row `lane % 8` of matrix `lane // 8` begins at `index + offset`, in elements of 4 bytes, aligned to 4 of them;
        the offset is part of the instruction, where a sum of its own would take a register.
        A thread gets numbers 2 (lane % 4) and the next of row `lane // 4`; of that column if transposed.
        """

    @abc.abstractmethod
    def mma(self, a: Sequence[Value], b: Sequence[Value], sums: Sequence[Value], kind: str = "bf16") -> list[Value]:
        """`mma.sync.m16n8k16`: registers as in PTX' tables; `kind` of a and b is bf16 or f16, sums are f32."""

    @abc.abstractmethod
    def shuffle(self, value: Value, by: int) -> Value:
        """That of the thread whose number in the warp differs in the bits `by`."""

    @abc.abstractmethod
    def asm(
        self, text: str, inputs: Sequence[Value], kinds: Sequence[str], twin: Callable[..., Any], volatile: bool = False
    ) -> list[Value]:
        """An instruction, outputs first; `twin` does the same with NumPy arrays of int32 or float32."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """All threads of the warpgroup have come so far, and see what the others have written."""

    # Made of those above.

    def load_one(self, memory: Memory, index: Value, kind: str = F32) -> Value:
        return self.load(memory, index, kind)[0]

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.asm("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], [F32], _fma)[0]

    def opaque(self, x: Value) -> Value:
        """The same number, of which the compiler knows nothing: what is made of it is not moved out of a loop."""
        return self.asm("mov.b32 $0, $1;", [x], [x.kind], lambda x: x, volatile=True)[0]

    def larger(self, a: Value, b: Value) -> Value:
        """The maximum of two floats in one instruction; a NaN gives way to a number."""
        return self.asm("max.f32 $0, $1, $2;", [a, b], [F32], np.fmax)[0]

    def exp2(self, x: Value) -> Value:
        return self.asm("ex2.approx.ftz.f32 $0, $1;", [x], [F32], lambda x: np.exp2(x, dtype=np.float32))[0]

    def rsqrt(self, x: Value) -> Value:
        return self.asm("rsqrt.approx.f32 $0, $1;", [x], [F32], lambda x: 1 / np.sqrt(x, dtype=np.float32))[0]

    def reciprocal(self, x: Value) -> Value:
        return self.asm("rcp.approx.f32 $0, $1;", [x], [F32], lambda x: np.float32(1) / x)[0]

    def popcount(self, x: Value) -> Value:
        return self.asm("popc.b32 $0, $1;", [x], [I32], lambda x: np.bitwise_count(x.view(np.uint32)))[0]

    def over_warp(self, name: str, x: Value) -> Value:
        """The "max", "min" (signed) or "or" of a warp's integers, of which all threads take part."""
        text = f"redux.sync.{name}.{'b32' if name == 'or' else 's32'} $0, $1, 0xffffffff;"
        return self.asm(text, [x], [I32], lambda x: _over_warp(name, x), volatile=True)[0]

    def pack(self, low: Value, high: Value, kind: str = "bf16") -> Value:
        """Two floats, rounded to nearest even, in one word."""
        text = f"cvt.rn.{kind}x2.f32 $0, $2, $1;"
        return self.asm(text, [low, high], [I32], lambda low, high: _pack(low, high, kind))[0]

    def unpack(self, word: Value) -> tuple[Value, Value]:
        """The two bf16 of a word as floats, the low one first."""
        return (word << 16).as_float(), (word & 0xFFFF0000).as_float()

    def sum_over(self, value: Value, threads: int = WARP) -> Value:
        """Of each group of so many neighbouring threads, in one order for all of them."""
        by = threads // 2
        while by:
            value = value + self.shuffle(value, by)
            by //= 2
        return value


def half_type(kind: str) -> Any:
    """NumPy's type of "bf16" or "f16"."""
    import ml_dtypes

    return {"bf16": ml_dtypes.bfloat16, "f16": np.float16}[kind]


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _over_warp(name: str, x: np.ndarray) -> np.ndarray:
    operation = {"max": np.maximum, "min": np.minimum, "or": np.bitwise_or}[name]
    return np.repeat(operation.reduce(x.reshape(-1, WARP), axis=1), WARP)


def _pack(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    low_bits, high_bits = (x.astype(half_type(kind)).view(np.uint16).astype(np.uint32) for x in (low, high))
    return (low_bits | high_bits << 16).view(np.int32)
