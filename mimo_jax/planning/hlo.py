"""Reads a compiled program's text: what it sends between devices, and the large arrays it makes on the way."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

_ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(?.*?\)?) ([\w\-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|calls|to_apply|branch_computations|true_computation|false_computation)=\{?(%[\w.\-]+)")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# They name an array that exists already, or one that is never stored as such.
_VIEWS = ("parameter", "bitcast", "get-tuple-element", "tuple", "while", "conditional", "constant", "iota")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program: its operation, the bytes of its result, where in the model it comes from."""

    name: str
    opcode: str
    shape: str
    nbytes: int
    source: str
    line: str


def array_bytes(shape: str) -> int:
    """Bytes of the largest array in a shape as HLO writes it; of a pair (input, output) that is the output."""
    sizes = []
    for dtype, dims in _ARRAY.findall(shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        sizes.append(count * _ITEMSIZE.get(dtype, 0))
    return max(sizes, default=0)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Computation -> its instructions, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[1], [])
            entry = found[1] if line.startswith("ENTRY") else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            source = re.search(r'op_name="([^"]*)"', line)
            shape = re.sub(r"\{[^}]*\}", "", found[2])
            current.append(
                Instruction(found[1], found[3], shape, array_bytes(shape), source[1] if source else "", line)
            )
    return computations, entry


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction and the loops around it, outermost first."""

    instruction: Instruction
    loops: tuple[str, ...]


def executed(text: str) -> Iterator[Executed]:
    """Every instruction that runs as a kernel or a transfer; what is fused into one counts as that one."""
    computations, entry = parse(text)

    def walk(name: str, loops: tuple[str, ...]) -> Iterator[Executed]:
        for instruction in computations.get(name, []):
            if instruction.opcode not in _VIEWS:
                yield Executed(instruction, loops)
            inner = (*loops, instruction.name) if instruction.opcode == "while" else loops
            if instruction.opcode in ("while", "conditional", "call", "async-start"):
                for kind, called in _CALLED.findall(instruction.line):
                    if kind != "to_apply" or instruction.opcode == "call":
                        yield from walk(called.lstrip("%"), inner)

    yield from walk(entry, ())


def is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def result_shape(instruction: Instruction) -> str:
    """The shape of what it makes; one that only starts has a pair (inputs, output)."""
    if not instruction.opcode.endswith("-start") or not instruction.shape.startswith("("):
        return instruction.shape
    return [match[0] for match in _ARRAY.finditer(instruction.shape)][-1]


def parameter_shapes(text: str) -> set[str]:
    """Shapes of the arrays that the program is given."""
    computations, entry = parse(text)
    return {instruction.shape for instruction in computations[entry] if instruction.opcode == "parameter"}
