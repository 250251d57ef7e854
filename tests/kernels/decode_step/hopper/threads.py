"""Runs a whole `Program` in NumPy: a thread for each role of each CTA of each device, tiles by `lanes.emulated`.

Barriers, ring, pages and counters are those of the kernel, in Python's terms. Copies may take their time, in a random
order, so that what is read too early shows. A wait that takes too long is an error.
"""

import random
import threading
from dataclasses import dataclass, field, fields
from functools import partial

import jax
import numpy as np

from pallas_kernels.decode_step.hopper import roles
from pallas_kernels.decode_step.hopper.config import CONSUMERS, SLOT_COPIES, SLOT_WORDS
from pallas_kernels.decode_step.hopper.copies import Filled
from pallas_kernels.decode_step.hopper.plan import PAGE_PARTS
from pallas_kernels.decode_step.hopper.program import Program
from pallas_kernels.decode_step.hopper.sync import Unit
from pallas_kernels.decode_step.hopper.table import EPOCH
from pallas_kernels.lanes import emulated

SLOTS = 6  # of the ring, however little shared memory few CTAs would leave
LIMIT = 60  # seconds that a thread may wait


class Stuck(Exception):
    """A wait that took too long, or another thread's failure."""


class Ref:
    """A NumPy array as a kernel's ref."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def at(self):
        return self

    @property
    def shape(self):
        return self.array.shape

    def __getitem__(self, index):
        found = self.array[index]
        return Ref(found) if isinstance(found, np.ndarray) else found.item()

    def __setitem__(self, index, value) -> None:
        self.array[index] = value


@dataclass
class World:
    """What all threads share: a condition that everything is announced on, and whether somebody has failed."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    failure: BaseException | None = None
    seed: int = 0
    delay: float = 0.0

    def until(self, holds) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.failure or holds(), LIMIT) or self.failure:
                raise Stuck

    def change(self, act) -> None:
        with self.changed:
            act()
            self.changed.notify_all()


class Barrier:
    """A memory barrier: a phase is complete after so many arrivals; each thread waits for one phase after the other."""

    def __init__(self, world: World, arrivals: int) -> None:
        self.world, self.arrivals, self.arrived, self.seen = world, arrivals, 0, {}

    def arrive(self) -> None:
        def act():
            self.arrived += 1

        self.world.change(act)

    def wait(self) -> None:
        me = threading.get_ident()
        self.seen[me] = self.seen.get(me, 0) + 1
        self.world.until(lambda: self.arrived >= self.seen[me] * self.arrivals)


class Barriers(list):
    """Several, as a ref of barriers."""

    @property
    def at(self):
        return self


class Queue:
    """As `roles.Queue`."""

    def __init__(self, world: World, places: int, fills: int, readers: int) -> None:
        self.full = Barriers(Barrier(world, fills) for _ in range(places))
        self.empty = [Barrier(world, readers) for _ in range(places)]
        self.places = places

    def place(self, turn: int) -> int:
        return turn % self.places

    def before_fill(self, turn: int) -> None:
        if turn >= self.places:
            self.empty[self.place(turn)].wait()

    def before_read(self, turn: int) -> None:
        self.full[self.place(turn)].wait()

    def freed(self, turn: int, stored: bool = False) -> None:
        self.empty[self.place(turn)].arrive()


class Ring(Queue):
    """As `roles.Ring`: a barrier for each team."""

    def __init__(self, world: World, places: int) -> None:
        super().__init__(world, places, 1, 1)
        self.full = [[Barrier(world, SLOT_COPIES) for _ in range(places)] for _ in range(CONSUMERS)]
        self.slots = Ref(np.full((places, SLOT_WORDS), -1, np.int32))

    def fill(self, turn: int, team: int, copy) -> None:
        self.before_fill(turn)
        self.slots.array[self.place(turn)] = -1  # NaN as floats and as bf16
        copy(self.slots[self.place(turn)], self.full[team][self.place(turn)])

    def before_read(self, turn: int, team: int) -> None:
        self.full[team][self.place(turn)].wait()


class Counters:
    """As `sync.GpuCounters`."""

    def __init__(self, machine, unit: Unit, is_first: bool) -> None:
        self.machine, self.unit, self.is_first = machine, unit, is_first

    def wait(self, counter, wanted, row, scope="gpu", reads="loads") -> None:
        counts = self.machine.counts[self.machine.rank]
        self.machine.world.until(lambda: counts.array[counter] >= wanted)
        self._meet()

    def signal(self, counter, peers=None, wrote="stores") -> None:
        self._meet()
        if self.is_first:

            def act():
                for device in [self.machine.rank] if peers is None else peers:
                    self.machine.counts[device].array[counter] += 1

            self.machine.world.change(act)

    def _meet(self) -> None:
        if self.unit == Unit.CONSUMERS:
            self.machine.meet()


class Machine:
    """One CTA. `devices` are the buffers of each device."""

    def __init__(self, world: World, plan, cta: int, rank: int, devices: list) -> None:
        self.world, self.cta, self.rank, self.devices = world, cta, rank, devices
        self.counts = [device.counts for device in devices]
        self.peers = list(range(plan.devices))
        self.teams = threading.Barrier(CONSUMERS)
        self.random = random.Random(world.seed * 1000 + cta * 10 + rank)

    def call(self, tile, refs, scalars, state=None):
        lanes = emulated.Emulated()
        arrays = [ref.array for ref in refs]
        emulated.run(tile, arrays, {name: int(value) for name, value in scalars.items()}, lanes, state)
        return None if state is None else lanes.state

    def first_state(self, numbers):
        return list(numbers)

    def loop(self, first, last, body, carry=None):
        for index in range(int(first), int(last)):
            carry = body(index, carry)
        return carry

    def when(self, condition, run) -> None:
        if condition:
            run()

    def integer(self, condition) -> int:
        return int(condition)

    def div(self, a, b) -> int:
        assert a >= 0 and b > 0
        return int(a) // int(b)

    def rem(self, a, b) -> int:
        assert a >= 0 and b > 0
        return int(a) % int(b)

    def smaller(self, a, b) -> int:
        return min(a, b)

    def part(self, ref, first, size):
        assert 0 <= first and first + size <= ref.array.size, (first, size, ref.array.shape)
        return Ref(ref.array[first : first + size])

    def copy(self, source, place, barrier) -> None:
        assert source.array.size == place.array.size
        assert source.array.nbytes % 128 == 0

        def act():
            place.array[:] = source.array.view(place.array.dtype)
            barrier.arrive()

        if self.world.delay:
            threading.Timer(self.random.random() * self.world.delay, act).start()
        else:
            act()

    def prefetch(self, source, count=1) -> None:
        pass

    def push(self, source, ref, first, size) -> None:
        parts = next(f.name for f in fields(type(self.devices[0])) if getattr(self.devices[self.rank], f.name) is ref)
        for device in self.peers:
            getattr(self.devices[device], parts).array[first : first + size] = source.array

    def meet(self) -> None:
        try:
            self.teams.wait(LIMIT)
        except threading.BrokenBarrierError:
            raise Stuck from None

    def arrive(self, barrier) -> None:
        barrier.arrive()

    def arrive_alone(self, barrier) -> None:
        barrier.arrive()

    def wait(self, barrier) -> None:
        barrier.wait()

    def count_round(self, counts, place) -> None:
        counts.array[place] += 1


def walk(table, cta, first, last, handlers, carry, before=lambda row: None, after=lambda row: None):
    for number in range(first, last):
        words = table[cta, number]
        row = roles.Row(*(int(word) for word in words[: len(roles.STORED)]), number=number)
        before(row)
        for kinds, handler in handlers.items():
            if row.kind in kinds:
                carry = handler(row, carry)
        after(row)
    return carry


def shared_memory(world: World, plan):
    """NaN, or numbers that nothing may depend on."""
    from pallas_kernels.decode_step.hopper.mosaic_gpu import scratch

    shapes = scratch(plan)[0]
    found = {}
    for f in fields(type(shapes)):
        shape = getattr(shapes, f.name)
        if hasattr(shape, "dtype") and hasattr(shape, "shape") and f.name not in ("listed", "staged"):
            filler = np.nan if np.dtype(shape.dtype) == np.float32 else -1
            found[f.name] = Ref(np.full(shape.shape, filler, shape.dtype))
        else:
            found[f.name] = Barrier(world, {"listed": 1, "staged": CONSUMERS}[f.name])
    return type(shapes)(**found)


def _begin(program, team: int, counters: Counters, epoch, row) -> None:
    program.await_row(counters, epoch, row)
    program.begin_row(team, row)


def _consume(program, team: int, rows: tuple, ends: tuple) -> None:
    program.resume(team)
    walk(*rows, program.consume(team), (0, 0), *ends)


def run(plan, table, step, tokens, weights, devices, seed=0, delay=0.0) -> None:
    """A launch on all devices; weights and buffers are trees of NumPy arrays of each; buffers change in place."""
    world = World(seed=seed, delay=delay)
    held = [jax.tree.map(Ref, device) for device in devices]
    given = [jax.tree.map(Ref, each) for each in weights]
    threads = []
    for rank in range(plan.devices):
        for cta in range(plan.ctas):
            machine = Machine(world, plan, cta, rank, held)
            ring, pages = Ring(world, SLOTS), Queue(world, PAGE_PARTS, 1, CONSUMERS)
            shared = shared_memory(world, plan)
            program = Program(plan, machine, step, Ref(tokens), given[rank], held[rank], shared, ring, pages)
            threads += [threading.Thread(target=role) for role in _roles(world, program, machine, table)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.failure:
        raise world.failure


def _roles(world: World, program: Program, machine: Machine, table):
    rows = (table, machine.cta, program.first, program.last)
    epoch = lambda: program.buffers.counts[EPOCH]  # noqa: E731

    def guarded(run):
        def role():
            try:
                run()
            except BaseException as error:
                if world.failure is None or isinstance(world.failure, Stuck):
                    world.failure = error
                machine.teams.abort()
                world.change(lambda: None)

        return role

    for team in range(CONSUMERS):
        own = Counters(machine, Unit.CONSUMERS, team == 0)
        ends = partial(_begin, program, team, own, epoch), partial(program.signal_row, own)
        yield guarded(partial(_consume, program, team, rows, ends))
    yield guarded(lambda: walk(*rows, program.load(), Filled(0, 0)))
    awaits = partial(program.await_fetch, Counters(machine, Unit.WARP, True), epoch)
    yield guarded(lambda: walk(*rows, program.fetch(), 0, awaits))
    yield guarded(lambda: walk(*rows, program.send(Counters(machine, Unit.WARP, True)), 0))
