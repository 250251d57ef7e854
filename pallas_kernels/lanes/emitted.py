"""Tiles as code of a Mosaic kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.lanes.values import BOOL, F32, I32, WARPGROUP, Lanes, Memory, Value

SPLAT = plgpu.Layout.WG_SPLAT(())
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
    "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
)
_LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4{way}.shared.b16 {{$0, $1, $2, $3}}, [$4 + {bytes}];"


def call(
    tile: Callable[..., Any], refs: Sequence[Any], scalars: Mapping[str, Any], state: jax.Array | None = None
) -> jax.Array | None:
    """Inside of a kernel's body: the tile's code, with refs as its memories and int32 scalars.

    Given a `state`, the tile takes its values as one more argument, and returns as many, which are the new state.
    """
    names = tuple(scalars)
    kind = None if state is None else _state_type(state.size // WARPGROUP)
    arg_types = ((plgpu.RefType(),) * len(refs), (SPLAT,) * len(names), () if kind is None else (kind.layout,))

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=kind)
    def inline(_, refs, values, states):
        lanes = Emitted()
        memories = [Memory(utils.memref_ptr(ref)) for ref in refs]
        found = {name: Value(lanes, I32, value.registers.item()) for name, value in zip(names, values)}
        if kind is None:
            tile(lanes, memories, found)
            return None
        return _packed(lanes, tile(lanes, memories, found, _unpacked(lanes, states[0])), kind.layout)

    return inline(tuple(refs), tuple(scalars[name] for name in names), () if state is None else (state,))


def state_of(numbers: Sequence[float]) -> jax.Array:
    """A first state: f32, the same in all threads. It may be carried by a loop of the kernel."""
    kind = _state_type(len(numbers))

    @plgpu.inline_mgpu(return_type=kind)
    def inline(_):
        lanes = Emitted()
        return _packed(lanes, [lanes.constant(number, F32) for number in numbers], kind.layout)

    return inline()


def opaque(number: int) -> jax.Array:
    """An int32 that the compiler knows nothing about."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SPLAT))
    def inline(_):
        lanes = Emitted()
        found = lanes.opaque(lanes.constant(number, I32))
        registers = np.empty((), object)
        registers[()] = found.held
        return mgpu.FragmentedArray(_registers=registers, _layout=SPLAT.to_mgpu(), _is_signed=True)

    return inline()


def _state_type(count: int) -> plgpu.ShapeDtypeStruct:
    """To Pallas, so many registers of each thread are an array; which element is whose is of no interest."""
    shape = (count * WARPGROUP,)
    return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WG_STRIDED(shape, vec_size=1))


def _packed(lanes: Emitted, values: Sequence[Value], layout: Any) -> mgpu.FragmentedArray:
    undefined, first = llvm.mlir_undef(ir.VectorType.get((1,), lanes.types[F32])), lanes.constant(0, I32).held
    registers = np.empty(len(values), object)
    registers[:] = [llvm.insertelement(undefined, lanes.value(value, F32).held, first) for value in values]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)


def _unpacked(lanes: Emitted, array: mgpu.FragmentedArray) -> list[Value]:
    first = lanes.constant(0, I32).held
    return [Value(lanes, F32, llvm.extractelement(register, first)) for register in array.registers]


class Emitted(Lanes):
    """See `Lanes`."""

    def __init__(self) -> None:
        self.types = {
            I32: ir.IntegerType.get_signless(32),
            F32: ir.F32Type.get(),
            BOOL: ir.IntegerType.get_signless(1),
        }
        # Volatile: else the compiler forms what follows from it for all tiles before a kernel's loop, and spills it.
        thread = Value(self, I32, utils.thread_idx())
        self.thread = self._asm("mov.b32 $0, $1;", [thread], [I32], True)[0] % WARPGROUP

    def constant(self, number: float, kind: str) -> Value:
        if kind == I32 and number >= 2**31:
            number -= 2**32
        return Value(self, kind, utils.c(float(number) if kind == F32 else number, self.types[kind]))

    def binary(self, name: str, a: Value, b: Value) -> Value:
        if name in _INT_COMPARISONS:
            compare, predicate = (arith.cmpf, _FLOAT_COMPARISONS) if a.kind == F32 else (arith.cmpi, _INT_COMPARISONS)
            return Value(self, BOOL, compare(predicate[name], a.held, b.held))
        operation = (_FLOATS if a.kind == F32 else _INTS)[name]
        return Value(self, a.kind, operation(a.held, b.held))

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return Value(self, a.kind, arith.select(condition.held, a.held, b.held))

    def bitcast(self, value: Value, kind: str) -> Value:
        return Value(self, kind, arith.bitcast(self.types[kind], value.held))

    def _at(self, memory: Memory, index: Value, kind: str) -> Any:
        return utils.getelementptr(memory.base, [index.held], self.types[kind])

    def load(self, memory: Memory, index: Value, kind: str = F32, count: int = 1) -> list[Value]:
        vector = ir.VectorType.get((count,), self.types[kind])
        loaded = llvm.load(vector, self._at(memory, index, kind), alignment=4 * count)
        return [Value(self, kind, llvm.extractelement(loaded, self.constant(i, I32).held)) for i in range(count)]

    def store(self, values: Sequence[Value], memory: Memory, index: Value) -> None:
        kind, at = values[0].kind, self._at(memory, index, values[0].kind)
        if len(values) == 1:
            llvm.store(values[0].held, at, alignment=4)
            return
        vector = llvm.mlir_undef(ir.VectorType.get((len(values),), self.types[kind]))
        for i, value in enumerate(values):
            vector = llvm.insertelement(vector, value.held, self.constant(i, I32).held)
        llvm.store(vector, at, alignment=4 * len(values))

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with utils.when(condition.held):
            yield

    def loop(self, first: Any, last: Any, step: int, body: Callable[..., Sequence[Value]], carried: Sequence[Value]):
        start, end, by = (self.value(bound, I32).held for bound in (first, last, step))
        if isinstance(last, int):  # else the compiler writes short loops out
            end = self.opaque(self.constant(last, I32)).held
        loop = scf.ForOp(start, end, by, [value.held for value in carried])
        kinds = [value.kind for value in carried]
        with ir.InsertionPoint(loop.body):
            arguments = [Value(self, kind, held) for kind, held in zip(kinds, loop.inner_iter_args)]
            scf.yield_([value.held for value in body(Value(self, I32, loop.induction_variable), *arguments)])
        return [Value(self, kind, held) for kind, held in zip(kinds, loop.results)]

    def branch(self, condition: Value, body: Callable[..., Sequence[Value]], carried: Sequence[Value]) -> list[Value]:
        chosen = scf.IfOp(condition.held, [value.held.type for value in carried], has_else=True)
        with ir.InsertionPoint(chosen.then_block):
            scf.yield_([value.held for value in body(*carried)])
        with ir.InsertionPoint(chosen.regions[1].blocks[0]):
            scf.yield_([value.held for value in carried])
        return [Value(self, value.kind, held) for value, held in zip(carried, chosen.results)]

    def load_matrices(self, memory: Memory, index: Value, offset: int = 0, transposed: bool = False) -> list[Value]:
        address = Value(self, I32, llvm.ptrtoint(self.types[I32], self._at(memory, index, I32)))
        text = _LDMATRIX.format(way=".trans" if transposed else "", bytes=4 * offset)
        return self._asm(text, [address], [I32] * 4, True)

    def mma(self, a: Sequence[Value], b: Sequence[Value], sums: Sequence[Value], kind: str = "bf16") -> list[Value]:
        return self._asm(_MMA.format(kind=kind), [*a, *b, *sums], [F32] * 4, False)

    def shuffle(self, value: Value, by: int) -> Value:
        return Value(self, value.kind, utils.shfl_bfly(value.held, by))

    def asm(self, text, inputs, kinds, twin, volatile: bool = False) -> list[Value]:
        return self._asm(text, inputs, kinds, volatile)

    def _asm(self, text: str, inputs: Sequence[Value], kinds: Sequence[str], volatile: bool) -> list[Value]:
        letters = {I32: "r", F32: "f"}
        outputs = [f"={letters[kind]}" for kind in kinds]
        constraints = ",".join([*outputs, *(letters[value.kind] for value in inputs)])
        types = [self.types[kind] for kind in kinds]
        result = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
        held = [value.held for value in inputs]
        found: Any = llvm.inline_asm(result, held, text, constraints, has_side_effects=volatile)
        if len(types) == 1:
            return [Value(self, kinds[0], found)]
        parts = [llvm.extractvalue(kind, found, [i]) for i, kind in enumerate(types)]
        return [Value(self, kind, part) for kind, part in zip(kinds, parts)]

    def barrier(self) -> None:
        utils.warpgroup_barrier()


_INTS = {
    "add": arith.addi,
    "sub": arith.subi,
    "mul": arith.muli,
    "div": arith.divui,
    "rem": arith.remui,
    "and": arith.andi,
    "or": arith.ori,
    "xor": arith.xori,
    "shl": arith.shli,
    "shr": arith.shrui,
    "max": arith.maxsi,
    "min": arith.minsi,
}
_FLOATS = {
    "add": arith.addf,
    "sub": arith.subf,
    "mul": arith.mulf,
    "div": arith.divf,
    "max": arith.maximumf,
    "min": arith.minimumf,
}
_INT_COMPARISONS = {
    "lt": arith.CmpIPredicate.slt,
    "le": arith.CmpIPredicate.sle,
    "gt": arith.CmpIPredicate.sgt,
    "ge": arith.CmpIPredicate.sge,
    "eq": arith.CmpIPredicate.eq,
}
_FLOAT_COMPARISONS = {
    "lt": arith.CmpFPredicate.OLT,
    "le": arith.CmpFPredicate.OLE,
    "gt": arith.CmpFPredicate.OGT,
    "ge": arith.CmpFPredicate.OGE,
    "eq": arith.CmpFPredicate.OEQ,
}
