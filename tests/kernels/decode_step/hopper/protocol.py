"""A small decode-like program on the Hopper kernel's skeleton: run in Pallas' interpreter, or compiled for GPUs.

Devices share features. A layer has three rows in each CTA: `reduce` adds the devices' sums of its own columns of the
residual in the order of ranks and publishes them, `widen` makes its own features of all columns, `narrow` multiplies
all features of a device and sends the sums of its own columns to every device.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_step.hopper import roles, sync
from pallas_kernels.decode_step.hopper.roles import Queue, Ring, Row
from pallas_kernels.decode_step.hopper.sync import Unit, target
from tests.kernels.decode_step.hopper.passing import Eager, EagerQueue, fetch_parts, load_items, multiply_items

LAYERS, PARITY, ROUNDS = 2, 2, 2
TOKENS, ROWS = 8, 8  # rows of a block: an item; what a CTA owns of columns or features comes in blocks
BLOCKS = 6  # of columns, and of each device's features: four CTAs own one or two, two own three
WIDTH = ROWS * BLOCKS
PARTS, PAGES = 3, 2
PART_COLS = WIDTH // PARTS
CHUNKS = {"widen": 2, "narrow": 1}  # of a part
MAX_ITEMS, SLOTS = 3, 4
REDUCE, WIDEN, NARROW = 1, 2, 3
STREAM, HIDDEN, ARRIVED = 0, 1, 2  # counters; the last of each CTA
FIRST = 1  # a flag: there is nothing to be added yet
IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
POLL, LATE = 0.1, 0.2  # seconds
MOST_POLLS = 80  # before a wait in a broken program counts as one for ever
STUCK = 3  # a process' status

# How the program can be broken, and on how many devices that shows.
BROKEN = {
    "no wait for arrivals": 2,
    "one place for arrivals": 2,
    "own sums first": 2,
    "wrong parity": 1,
    "no wait for the stream": 1,
    "no wait for the features": 1,
    "no signal of the stream": 1,
    "no signal of arrival": 1,
    "signal before all teams are done": 1,
    "epoch forgotten": 1,
    "slot read too early": 1,
    "slot filled too early": 1,
    "page filled too early": 1,
    "sent before it is staged": 1,
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What runs the program. Interpreted CTAs and devices are one cluster: those of a grid run one after the other."""

    devices: int
    ctas: int
    teams: int
    is_real: bool = False


def share(cta: int, ctas: int) -> tuple[int, int]:
    """Blocks of a CTA."""
    return cta * BLOCKS // ctas, (cta + 1) * BLOCKS // ctas


def table_of(machine: Machine) -> np.ndarray:
    """Lists of rows, the same on all devices."""
    ctas, devices = machine.ctas, machine.devices
    reached = functools.partial(dict, per_round=LAYERS * ctas)

    def rows(cta: int) -> list[Row]:
        first, last = share(cta, ctas)
        row = functools.partial(Row, first=first, last=last)
        arrived = dict(wait=ARRIVED + cta, per_round=LAYERS * devices)
        found = [row(REDUCE, **arrived, signal=STREAM, reader=FIRST)]
        for layer in range(LAYERS):
            parity = layer % PARITY
            stream = dict(wait=STREAM, value=(layer + 1) * ctas, per_round=(LAYERS + 1) * ctas)
            features = reached(wait=HIDDEN, value=(layer + 1) * ctas)
            found.append(row(WIDEN, layer, **stream, signal=HIDDEN))
            found.append(row(NARROW, layer, **features, arrived=ARRIVED + cta, parity=parity))
            found.append(row(REDUCE, layer, **arrived, value=(layer + 1) * devices, signal=STREAM, parity=parity))
        return found

    return roles.encode([rows(cta) for cta in range(ctas)])


@dataclasses.dataclass(frozen=True)
class Memory:
    """Refs in global memory. What devices do not share has an axis for them, of length 1 where each has its own."""

    epoch: Any  # int32 [1]: rounds before this one
    table: Any
    start: Any  # [BLOCKS, TOKENS, ROWS]: the residual to begin with
    widen: Any  # [devices, LAYERS, chunks, BLOCKS, ROWS * columns of a chunk]
    narrow: Any
    counts: Any
    fault: Any
    x: Any  # [devices, BLOCKS, TOKENS, ROWS]: the residual
    stream: Any  # [devices, PARTS, TOKENS, PART_COLS]: a part is one copy
    hidden: Any  # the same
    parts: Any  # [devices, PARITY, ranks, BLOCKS, TOKENS, ROWS]


@dataclasses.dataclass(frozen=True)
class Shared:
    """Refs in shared memory, or what is allocated for them."""

    slots: Any  # [SLOTS, ROWS * PART_COLS]
    page: Any  # [PAGES, TOKENS, PART_COLS]
    sums: Any  # [MAX_ITEMS, TOKENS, ROWS]
    stage: Any  # the same
    ring: Any
    pages: Any
    staged: Any
    meeting: Any


for _holder in (Memory, Shared):
    jax.tree_util.register_dataclass(_holder)


def scratch(teams: int) -> Shared:
    floats = functools.partial(plgpu.SMEM, dtype=jnp.float32)
    sums = floats((MAX_ITEMS, TOKENS, ROWS))
    page = floats((PAGES, TOKENS, PART_COLS))
    queues = Ring.barriers(SLOTS, teams), Queue.barriers(PAGES, 1, teams), Queue.barriers(1, teams, 1)
    return Shared(floats((SLOTS, ROWS * PART_COLS)), page, sums, sums, *queues, plgpu.Barrier(num_arrivals=teams))


class Program:
    """One CTA. `broken` names what is left out or done wrongly, and thereby who is late, so that it shows.

    In the interpreter the whole program has all that lateness, which it must not mind.
    """

    def __init__(self, machine: Machine, broken: str, memory: Memory, shared: Shared) -> None:
        self.machine, self.broken, self.memory, self.shared = machine, broken, memory, shared
        self.cta = lax.axis_index("cta")
        self.rank = lax.axis_index("device") if machine.devices > 1 else 0
        self.device = 0 if machine.is_real else self.rank  # index of what this device has
        self.peers = [lax.rem(self.rank + peer, machine.devices) for peer in range(machine.devices)]
        self.epoch = 0 if broken == "epoch forgotten" else memory.epoch[0]
        self.ring = Ring(*shared.ring, SLOTS, shared.slots, machine.teams)
        self.pages, self.staged = Queue(*shared.pages, PAGES), Queue(*shared.staged, 1)

    def run(self) -> None:
        read = functools.partial(
            roles.read if self.machine.is_real else roles.read_interpreted, self.memory.table, self.cta
        )
        walk = functools.partial(roles.walk, read, 0, self.memory.table.shape[1])

        def consume(team: Any) -> None:
            kinds = {REDUCE: self.reduce, WIDEN: self.widen, NARROW: self.narrow}
            handlers = {(kind,): functools.partial(handler, team) for kind, handler in kinds.items()}
            *_, staged = walk(handlers, (0, 0, 0))
            self.staged.drain(staged)

        def weights() -> None:
            load = functools.partial(functools.partial, self.load)
            self.ring.drain(walk({(WIDEN,): load("widen"), (NARROW,): load("narrow")}, 0))

        def fetch() -> None:
            fetch = functools.partial(functools.partial, self.fetch)
            self.pages.drain(walk({(WIDEN,): fetch("stream"), (NARROW,): fetch("hidden")}, 0))

        def send() -> None:
            walk({(NARROW,): self.send}, 0)

        roles.run(consume, [weights, fetch, send], self.machine.teams, self.machine.is_real)

    def counters(self, unit: Unit, role: int, is_first: Any = True) -> Any:
        memory, machine = self.memory, self.machine
        if machine.is_real:
            return sync.GpuCounters(memory.counts, memory.fault, self.cta, role, unit)
        writer = self.rank * machine.ctas + self.cta
        place = memory.counts, self.device, writer, self.shared.meeting
        most = MOST_POLLS if self.broken else None
        return sync.InterpretedCounters(*place, is_first, unit, functools.partial(pause, POLL, most=most))

    def wait(self, counters: Any, row: Row, more: int = 0, **how: Any) -> None:
        counters.wait(row.wait, target(self.epoch, row.per_round, row.value + more), row.number, **how)

    def may_be_late(self, broken: str) -> bool:
        return self.broken in (broken, "") and not self.machine.is_real

    def late(self, broken: str, is_late: Any = True) -> None:
        if self.may_be_late(broken):
            lax.while_loop(lambda times: is_late & (times < 1), functools.partial(pause, LATE), 0)

    def each_own(self, team: Any, row: Row, do: Any) -> None:
        """`do(item)` for a team's items of a row."""
        teams = self.machine.teams
        own = lax.div(row.last - row.first - team + teams - 1, teams)
        lax.fori_loop(0, own, lambda number, _: do(team + number * teams), None)

    # Consumers.

    def reduce(self, team: Any, row: Row, turns: Any) -> Any:
        memory, counters = self.memory, self.counters(Unit.CONSUMERS, 0, team == 0)
        more, parity = 0, row.parity
        if self.may_be_late("one place for arrivals"):
            # The second device is late: the first has sent again when it adds the sums of the first layer.
            more = jnp.where((self.rank == 1) & (row.layer == 0) & (row.reader != FIRST), 1, 0)
        if self.broken == "one place for arrivals":
            parity = 0
        if self.broken == "wrong parity":
            parity = 1 - parity
        if self.broken != "no wait for arrivals":
            self.wait(counters, row, more, scope="sys")
        for broken in ("no wait for the stream", "epoch forgotten"):
            self.late(broken, self.cta == 1)
        self.late("signal before all teams are done", team == 1)

        def add(item: Any) -> None:
            block = row.first + item
            if self.machine.is_real:
                memory.x[0, block, 0, 0] = memory.parts[0, parity, 0, block, 0, 0]
                return

            @pl.when(row.reader == FIRST)
            def _():
                memory.x[self.device, block] = memory.start[block]

            @pl.when(row.reader != FIRST)
            def _():
                total = memory.x[self.device, block]
                for rank in self.peers if self.broken == "own sums first" else range(self.machine.devices):
                    total = total + memory.parts[self.device, parity, rank, block]
                memory.x[self.device, block] = total

            self.publish(memory.stream, block, memory.x[self.device, block])

        self.each_own(team, row, add)
        if self.broken == "signal before all teams are done":
            counters = counters.by(Unit.WARP, 0)
        if self.broken != "no signal of the stream":
            counters.signal(row.signal)
        return turns

    def publish(self, buffer: Any, block: Any, value: Any) -> None:
        """A block's columns into a part; [TOKENS, ROWS]."""
        part, column = lax.div(block, BLOCKS // PARTS), lax.rem(block, BLOCKS // PARTS) * ROWS
        buffer[self.device, part, :, pl.ds(column, ROWS)] = value

    def widen(self, team: Any, row: Row, turns: Any) -> Any:
        turns = self.multiply("widen", team, row, turns)
        self.late("no wait for the features", self.cta == 1)

        def store(item: Any) -> None:
            block = row.first + item
            if self.machine.is_real:
                self.memory.hidden[0, 0, 0, block] = self.shared.sums[item, 0, 0]
            else:
                self.publish(self.memory.hidden, block, jnp.tanh(self.shared.sums[item]))

        self.each_own(team, row, store)
        self.counters(Unit.CONSUMERS, 0, team == 0).signal(row.signal)
        return turns

    def narrow(self, team: Any, row: Row, turns: Any) -> Any:
        *products, staged = self.multiply("narrow", team, row, turns)
        self.staged.before_fill(staged)
        self.late("sent before it is staged")

        def store(item: Any) -> None:
            if self.machine.is_real:
                self.shared.stage[item, 0, 0] = self.shared.sums[item, 0, 0]
            else:
                self.shared.stage[item] = self.shared.sums[item]

        self.each_own(team, row, store)
        self.staged.filled(staged)
        return (*products, staged + 1)

    def multiply(self, name: str, team: Any, row: Row, turns: Any) -> Any:
        shared, cols = self.shared, PART_COLS // CHUNKS[name]

        def tile(place: Any, chunk: Any, item: Any, slot: Any) -> None:
            if self.machine.is_real:
                shared.sums[item, 0, 0] = shared.slots[slot, 0] + shared.page[place, 0, chunk]
                return
            for broken in ("slot filled too early", "page filled too early"):
                self.late(broken, chunk == 0)
            first = lax.rem(chunk, CHUNKS[name]) * cols
            x = lax.dynamic_slice(shared.page[place], (0, first), (TOKENS, cols))
            product = jnp.dot(x, shared.slots[slot, pl.ds(0, ROWS * cols)].reshape(ROWS, cols).T)
            shared.sums[item] = jnp.where(chunk == 0, product, shared.sums[item] + product)

        *products, staged = turns
        ring = Eager(**vars(self.ring)) if self.broken == "slot read too early" else self.ring
        items = row.last - row.first
        products = multiply_items(ring, self.pages, tuple(products), team, items, PARTS, CHUNKS[name], tile)
        return (*products, staged)

    # Roles.

    def load(self, name: str, row: Row, turn: Any) -> Any:
        weights, words = getattr(self.memory, name), ROWS * PART_COLS // CHUNKS[name]
        self.late("slot read too early")

        def copy(chunk: Any, item: Any, slot: Any, barrier: Any) -> None:
            source = weights.at[self.device, row.layer, chunk, row.first + item]
            plgpu.copy_gmem_to_smem(source, slot.at[pl.ds(0, words)], barrier, oob_mode=IN_BOUNDS)

        ring = Eager(**vars(self.ring)) if self.broken == "slot filled too early" else self.ring
        return load_items(ring, turn, row.last - row.first, PARTS * CHUNKS[name], copy)

    def fetch(self, name: str, row: Row, turn: Any) -> Any:
        buffer = getattr(self.memory, name)
        if self.broken != f"no wait for the {'stream' if name == 'stream' else 'features'}":
            self.wait(self.counters(Unit.WARP, 2), row, reads="copies")

        def copy(part: Any, place: Any, barrier: Any) -> None:
            source = buffer.at[self.device, part]
            plgpu.copy_gmem_to_smem(source, self.shared.page.at[place], barrier, oob_mode=IN_BOUNDS)

        pages = EagerQueue(**vars(self.pages)) if self.broken == "page filled too early" else self.pages
        return fetch_parts(pages, turn, PARTS, copy)

    def send(self, row: Row, turn: Any) -> Any:
        if self.broken != "sent before it is staged":
            self.staged.before_read(turn)
        self.late("no wait for arrivals")
        parity = 0 if self.broken == "one place for arrivals" else row.parity

        def to_all(item: Any, _: None) -> None:
            for peer in self.peers:
                plgpu.copy_smem_to_gmem(self.shared.stage.at[item], self.there(peer, parity, row.first + item))

        lax.fori_loop(0, row.last - row.first, to_all, None)
        if self.broken != "no signal of arrival":
            peers = self.peers if self.machine.devices > 1 else None
            self.counters(Unit.WARP, 3).signal(row.arrived, peers=peers, wrote="copies")
        self.staged.freed(turn)
        return turn + 1

    def there(self, peer: Any, parity: Any, block: Any) -> Any:
        """Where a device has the sums that this one sends."""
        at = (parity, self.rank, block)
        if not self.machine.is_real:
            return self.memory.parts.at[peer, *at]
        is_alone = self.machine.devices == 1
        return (self.memory.parts if is_alone else plgpu.remote_ref(self.memory.parts, peer)).at[0, *at]


def pause(seconds: float, times: Any, most: int | None = None) -> Any:
    """Sleeps, in the interpreter, and counts how often. There is no other end for threads that wait for each other."""

    def sleep(times: Any) -> Any:
        if most is not None and times > most:
            os._exit(STUCK)
        time.sleep(seconds)
        return times + 1

    return jax.pure_callback(sleep, jax.ShapeDtypeStruct((), jnp.int32), times)


def launch(machine: Machine, broken: str, epoch: Any, table: Any, start: Any, weights: Any, state: Any) -> Any:
    """One round; `state` (counters, faults and buffers) is updated in place and returned."""
    refs = [jax.new_ref(array, memory_space=None if machine.is_real else plgpu.GMEM) for array in state]
    axes = {"num_threads": roles.threads_of(machine.teams, 3, machine.is_real), "thread_name": roles.THREAD_AXIS}
    if machine.is_real:
        mesh = plgpu.Mesh(grid=(machine.ctas,), grid_names=("cta",), **axes)
        options = {"unsafe_no_auto_barriers": True, "lowering_semantics": plgpu.LoweringSemantics.Lane}
        how = {"compiler_params": plgpu.CompilerParams(**options)}
    else:
        names = ("device", "cta")
        mesh = plgpu.Mesh(cluster=(machine.devices, machine.ctas), cluster_names=names, **axes)
        how = {"interpret": InterpretGPUParams(detect_races=False)}  # which knows nothing of these counters

    def body(*refs: Any) -> None:
        def with_scratch(shared: Shared) -> None:
            Program(machine, broken, Memory(*refs), shared).run()

        pl.run_scoped(with_scratch, scratch(machine.teams), collective_axes=roles.THREAD_AXIS)

    pl.kernel(body, out_type=(), mesh=mesh, **how)(epoch, table, start, *weights, *refs)
    return [ref[...] for ref in refs]


def samples(devices: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Residuals [ROUNDS, BLOCKS, TOKENS, ROWS]; two weights [devices, LAYERS, WIDTH rows, WIDTH columns]."""
    rng = np.random.default_rng(0)
    starts = rng.normal(size=(ROUNDS, BLOCKS, TOKENS, ROWS)).astype(np.float32)
    return starts, [(rng.normal(size=(devices, LAYERS, WIDTH, WIDTH)) * 0.2).astype(np.float32) for _ in range(2)]


def in_chunks(weight: np.ndarray, name: str) -> np.ndarray:
    """[devices, LAYERS, rows, columns] -> [devices, LAYERS, chunks, BLOCKS, words of a slot]."""
    chunks = PARTS * CHUNKS[name]
    cut = weight.reshape(*weight.shape[:2], BLOCKS, ROWS, chunks, WIDTH // chunks)
    return cut.transpose(0, 1, 4, 2, 3, 5).reshape(*weight.shape[:2], chunks, BLOCKS, -1)


def state_of(machine: Machine) -> list[np.ndarray]:
    """Counters and faults at zero, buffers of nothing but NaN."""
    devices, counters = machine.devices, ARRIVED + machine.ctas
    first, counts = (1, (counters,)) if machine.is_real else (devices, (devices, counters, devices * machine.ctas))
    streams = (first, PARTS, TOKENS, PART_COLS)
    buffers = (first, BLOCKS, TOKENS, ROWS), streams, streams, (first, PARITY, devices, BLOCKS, TOKENS, ROWS)
    integers = [np.zeros(counts, np.int32), np.zeros(len(sync.FAULT), np.int32)]
    return [*integers, *(np.full(shape, np.nan, np.float32) for shape in buffers)]
