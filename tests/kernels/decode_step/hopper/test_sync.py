"""Counters and the skeleton of roles as machine code for H200s that are not there."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import sass, topology
from pallas_kernels.decode_step.hopper import roles, sync
from pallas_kernels.decode_step.hopper.config import CONSUMERS
from pallas_kernels.decode_step.hopper.sync import FAULT, Unit
from pallas_kernels.hardware import GPUS
from tests.kernels.decode_step.hopper import protocol
from tests.kernels.triton_tools import needs_compiler

pytestmark = needs_compiler
CTAS, COUNTERS, PEERS = 132, 16, 8
PROXY, ALL_PROXIES, COPIES_DONE = "fence.proxy.async.global", "fence.proxy.async", "cp.async.bulk.wait_group"
ADD, ADD_THERE = "red.release.gpu.global.add.u32", "red.relaxed.sys.global.add.u32"
ORDER = re.compile(
    r"ld\.acquire\.\w+|fence\.(?:proxy\.async|acq_rel)\S*|cp\.async\.bulk\.wait_group|red\.\S+|bar\.\S+\s+\S+"
)
BARRIERS = {
    Unit.CONSUMERS: f"bar.sync {sync.CONSUMERS_BARRIER}",
    Unit.WARPGROUP: "bar.sync ",
    Unit.WARP: "bar.warp.sync ",
}


class Compiled:
    """A program of one kernel that updates its last argument, a list of arrays, in place."""

    def __init__(self, function, arguments, devices: int, folder: Path, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
        patch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
        mesh = Mesh(np.array(topology.devices(GPUS["h200"], PEERS)[:devices]), ("device",))
        specs = [P()] * (len(arguments) - 2) + [P("device")] * 2  # of the last two, which are lists
        if devices > 1:
            out = specs[-1]
            function = jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=out, check_vma=False)

        def place(spec: P, tree):
            times = devices if spec == P("device") else 1
            return jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(
                    (times * a.shape[0], *a.shape[1:]), a.dtype, sharding=NamedSharding(mesh, spec)
                ),
                tree,
            )

        placed = [place(spec, argument) for spec, argument in zip(specs, arguments)]
        program = jax.jit(function, donate_argnums=len(arguments) - 1).lower(*placed).compile()
        self.state_bytes = sum(a.nbytes for a in jax.tree.leaves(arguments[-1]))
        self.memory, self.hlo = program.memory_analysis(), program.as_text()
        (path,) = folder.glob("*.ptx")
        self.path, self.ptx = path, path.read_text()

    def is_one_kernel_in_place(self) -> bool:
        """Nothing before or after it: no copy, no fill, no collective operation; temporaries that hold no array."""
        entry = self.hlo[self.hlo.index("ENTRY") :]
        operations = set(re.findall(r"^ *(?:ROOT )?%\S+ = .*? ([a-z][a-z-]*)\(", entry, re.MULTILINE))
        return (
            operations <= {"parameter", "custom-call", "get-tuple-element", "tuple"}
            and entry.count(" custom-call(") == 1
            and self.memory.temp_size_in_bytes < 64
            and self.memory.alias_size_in_bytes >= self.state_bytes
        )


def compile_counters(use, unit: Unit, devices: int, folder: Path, patch: pytest.MonkeyPatch) -> Compiled:
    """`use(counters, peers)` in each CTA, by one unit."""

    def body(counts, fault):
        rank = lax.axis_index("device") if devices > 1 else 0
        peers = [lax.rem(rank + peer, devices) for peer in range(devices)]
        counters = sync.GpuCounters(counts, fault, lax.axis_index("cta"), unit=unit)
        thread = lax.axis_index("wg")
        if unit == Unit.WARP:

            @pl.when(thread == CONSUMERS)
            def _():
                plgpu.warp_map(lambda warp: pl.when(warp == 0)(lambda: use(counters, peers)))
        else:
            pl.when(thread < (1 if unit == Unit.WARPGROUP else CONSUMERS))(lambda: use(counters, peers))

    def run(_, state):
        refs = [jax.new_ref(array) for array in state]
        mesh = plgpu.Mesh(grid=(CTAS,), grid_names=("cta",), num_threads=CONSUMERS + 1, thread_name="wg")
        options = plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
        pl.kernel(body, out_type=(), mesh=mesh, compiler_params=options)(*refs)
        return [ref[...] for ref in refs]

    state = [np.zeros(COUNTERS, np.int32), np.zeros(len(FAULT), np.int32)]
    return Compiled(run, [[], state], devices, folder, patch)


def order_of(ptx: str) -> list[str]:
    """Fences, barriers and additions as they follow each other, after the kernel's own first barriers."""
    found = [" ".join(match.split()).rstrip(";,") for match in ORDER.findall(ptx)]
    return [each for each in found if each != "bar.sync 0" and not each.startswith("fence.mbarrier")]


@pytest.mark.parametrize("unit", Unit)
@pytest.mark.parametrize("wrote", ["stores", "copies"])
def test_a_signal_releases_what_all_threads_wrote(unit, wrote, tmp_path, monkeypatch):
    """Each thread fences (or its copies are complete), all meet, and then one adds with release."""
    compiled = compile_counters(lambda counters, _: counters.signal(3, wrote=wrote), unit, 1, tmp_path, monkeypatch)
    fence, barrier, *rest = order_of(compiled.ptx)
    assert fence == (ALL_PROXIES if wrote == "stores" else COPIES_DONE)
    assert barrier.startswith(BARRIERS[unit]) and rest == [ADD]
    assert ".sys" not in compiled.ptx and compiled.is_one_kernel_in_place()


def test_a_signal_to_peers_has_one_fence_for_all(tmp_path, monkeypatch):
    """Copies complete, the warp meets, one fence of the system's scope, and then one addition on each device."""

    def use(counters, peers):
        counters.signal(3, peers=peers, wrote="copies")

    compiled = compile_counters(use, Unit.WARP, PEERS, tmp_path, monkeypatch)
    done, barrier, fence, *additions = order_of(compiled.ptx)
    assert done == COPIES_DONE and barrier.startswith(BARRIERS[Unit.WARP])
    assert fence == "fence.acq_rel.sys" and additions == [ADD_THERE] * PEERS
    assert compiled.is_one_kernel_in_place()


@pytest.mark.parametrize("unit", Unit)
@pytest.mark.parametrize("reads", ["loads", "copies"])
@pytest.mark.parametrize("scope", ["gpu", "sys"])
def test_a_wait_acquires_before_all_go_on(unit, reads, scope, tmp_path, monkeypatch):
    """One thread polls with acquire, fences if copies follow, and then all meet."""

    def use(counters, _):
        counters.wait(3, 7, 5, scope=scope, reads=reads)

    compiled = compile_counters(use, unit, 1, tmp_path, monkeypatch)
    first, *rest = order_of(compiled.ptx)
    assert first == f"ld.acquire.{scope}"
    *fences, barrier = [each for each in rest if each != first]  # it polls again in blocks that lie elsewhere
    assert fences == ([PROXY] if reads == "copies" else []) and barrier.startswith(BARRIERS[unit])
    assert compiled.is_one_kernel_in_place()


def test_the_watchdog_stays_off_the_fast_path(tmp_path, monkeypatch):
    """What is polled again and again is the counter alone: neither the clock nor the flag."""
    compiled = compile_counters(lambda counters, _: counters.wait(3, 7), Unit.WARP, 1, tmp_path, monkeypatch)
    blocks = re.split(r"^(\$L__BB\w+):", compiled.ptx, flags=re.MULTILINE)
    loops = [text for label, text in zip(blocks[1::2], blocks[2::2]) if re.search(rf"bra\s+\{label};", text)]
    (poll,) = [text for text in loops if "ld.acquire" in text]
    for slow in ("globaltimer", "ld.relaxed", "atom."):
        assert slow in compiled.ptx and slow not in poll
    first_block = compiled.ptx[: compiled.ptx.index("ld.acquire")]
    assert "globaltimer" not in first_block


def test_registers_are_taken_from_those_given_back():
    """Or a warpgroup would wait for them for ever: no GPU has more than what the kernel began with."""
    taken = CONSUMERS * roles.CONSUMER_REGISTERS + roles.ROLE_REGISTERS
    assert taken <= (CONSUMERS + 1) * roles.LAUNCH_REGISTERS
    assert (CONSUMERS + 1) * 128 * roles.LAUNCH_REGISTERS <= 65_536


@pytest.mark.parametrize("devices", [1, PEERS])
def test_the_skeleton_for_h200(devices, tmp_path, monkeypatch):
    """The interpreted protocol's rows, roles and queues: no spill, one kernel in place, no collective operation."""
    machine = protocol.Machine(devices, CTAS, CONSUMERS, is_real=True)
    state = protocol.state_of(machine)
    _, weights = protocol.samples(1)
    cut = [protocol.in_chunks(weight, name) for weight, name in zip(weights, protocol.CHUNKS)]
    start = np.zeros((protocol.BLOCKS, protocol.TOKENS, protocol.ROWS), np.float32)
    arguments = [np.zeros(1, np.int32), protocol.table_of(machine), start, cut, state]
    run = functools.partial(protocol.launch, machine, "")
    compiled = Compiled(run, arguments, devices, tmp_path, monkeypatch)
    registers, stack, spilled = sass.assemble(compiled.path, tmp_path / "kernel.cubin")
    assert stack == spilled == 0 and registers == roles.LAUNCH_REGISTERS
    assert compiled.is_one_kernel_in_place()
    there = "red.relaxed.sys" if devices > 1 else "red.release.gpu"
    assert there in compiled.ptx and "cp.async.bulk.global.shared" in compiled.ptx


def test_rows_survive_the_table():
    """Numbers that are negative too; a row that does nothing neither waits nor signals."""
    row = roles.Row(
        7, layer=3, first=1, last=9, wait=4, value=132, per_round=264, signal=-1, arrived=5, parity=1, reader=2
    )
    table = roles.encode([[row, roles.Row(roles.NOTHING)], [row, row]])
    assert table.shape == (2, 2, roles.FIELDS) and table.dtype == jnp.int32
    assert roles.read(table, 1, 1) == roles.Row(**{**vars(row), "number": 1})
    nothing = roles.read(table, 0, 1)
    assert (nothing.kind, nothing.wait, nothing.signal) == (roles.NOTHING, roles.NO_COUNTER, roles.NO_COUNTER)
