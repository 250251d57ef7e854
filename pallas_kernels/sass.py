"""What a compiled kernel costs: registers and spills as ptxas reports them, instructions of its main loop as SASS.

For the PTX that Mosaic and Triton leave behind. Both tools come with the CUDA packages from PyPI; neither needs a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from pallas_kernels.hardware import GPUS

# Opcodes that the integer and logic pipe of a Hopper SM issues: 64 lanes per clock, half of the issue rate.
ALU = {"FMNMX", "FSETP", "IABS", "IADD3", "ISETP", "LEA", "LOP3", "PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VIADD"}
ALU |= {"VIADDMNMX", "VIMNMX", "MOV"}
TENSOR = "HMMA"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z0-9_]+)[.\s;](.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_WEIGHTS = 8  # that one thread decodes for one product


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one kernel; instructions are per weight that a thread decodes, in the loop that holds the products."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    local_instructions: int  # loads and stores of local memory, in the whole kernel
    instructions: float
    alu: float


def tool(name: str) -> str | None:
    """The path of ptxas or nvdisasm: beside the CUDA packages, or on the PATH."""
    found = importlib.util.find_spec("nvidia")
    folders = [] if found is None else found.submodule_search_locations or []
    paths = [path for folder in folders for path in sorted(Path(folder).glob(f"*/bin/{name}"))]
    return str(paths[0]) if paths else shutil.which(name)


def cost_of(ptx: Path, groups: int) -> Cost:
    """Assembles and takes apart the PTX of a kernel whose every decoding feeds `groups` products."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        registers, stack, spilled = assemble(ptx, cubin)
        listing = _run("nvdisasm", "-c", str(cubin))
    lines = listing.splitlines()
    opcodes = [opcode for opcode, _ in map(_parse, lines)]
    local = sum(opcode in ("LDL", "STL") for opcode in opcodes)
    loop = _main_loop(lines)
    weights = _WEIGHTS * sum(opcode == TENSOR for opcode in loop) / groups
    alu = sum(opcode in ALU for opcode in loop)
    return Cost(registers, stack, spilled, local, len(loop) / weights, alu / weights)


def assemble(ptx: Path, cubin: Path) -> tuple[int, int, int]:
    """Machine code for Hopper; its registers, bytes of stack, and bytes of spills, as ptxas reports them."""
    report = _run("ptxas", f"-arch={GPUS['h200'].arch}", "-v", str(ptx), "-o", str(cubin))
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    if found is None or registers is None:
        raise ValueError(f"{ptx}: ptxas' report is not understood: {report}")
    stack, stores, loads = map(int, found.groups())
    return int(registers[1]), stack, stores + loads


def instructions(cubin: Path) -> int:
    """Of a kernel."""
    return sum(bool(_parse(line)[0]) for line in _run("nvdisasm", "-c", str(cubin)).splitlines())


def _run(name: str, *arguments: str) -> str:
    path = tool(name)
    if path is None:
        raise FileNotFoundError(f"{name} is not installed")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _parse(line: str) -> tuple[str, str]:
    """Opcode without suffixes, and operands; empty where there is no instruction."""
    match = _INSTRUCTION.match(line)
    return (match[1], match[2]) if match else ("", "")


def _main_loop(lines: list[str]) -> list[str]:
    """Opcodes of the smallest loop around all products, without loops inside of it: those wait for data, if at all."""
    labels = {match[1]: number for number, line in enumerate(lines) if (match := _LABEL.match(line))}
    backward = []
    for number, line in enumerate(lines):
        opcode, operands = _parse(line)
        target = re.search(r"\.L_x_\d+", operands) if opcode == "BRA" else None
        if target and labels[target[0]] < number:
            backward.append((labels[target[0]], number))
    products = [number for number, line in enumerate(lines) if _parse(line)[0] == TENSOR]
    around = [(first, last) for first, last in backward if first < products[0] and last > products[-1]]
    first, last = min(around, key=lambda span: span[1] - span[0])
    skipped: set[int] = set()
    for inner_first, inner_last in backward:
        if first < inner_first and inner_last < last:
            skipped.update(range(inner_first, inner_last + 1))
    body = (_parse(line)[0] for number, line in enumerate(lines) if first <= number <= last and number not in skipped)
    return [opcode for opcode in body if opcode not in ("", "NOP")]
