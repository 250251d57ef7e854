"""Broken tables, and an executor with bad luck that shows which of them matter.

The executor is the oracle for `validate`: it runs rows in a random order with slow workers, and compares what every row
reads, when it begins and again when it ends, with the version that the row names. It cannot see proxies.
"""

import dataclasses
import heapq
import random
from collections.abc import Callable

from pallas_kernels.decode_step.schedule import Row

TORN = -1  # what a region holds while it is written


def run_adversarially(rows: list[Row], seed: int) -> str | None:
    """What went wrong in one random execution; None if nothing did."""
    return _Execution(rows, random.Random(seed)).run()


class _Execution:
    """Time passes by random amounts: before a row that could begin begins, and until it ends."""

    def __init__(self, rows: list[Row], rng: random.Random) -> None:
        self.rows, self.rng = rows, rng
        queues: dict[tuple, list[Row]] = {}
        for row in reversed(rows):
            queues.setdefault(row.worker, []).append(row)
        threads = rng.choice((1, 2, 3, 6)) if () in queues else 0  # that claim from one queue
        self.agents = [queues[worker] for worker in queues if worker] + [queues[()] for _ in range(threads)]
        self.pace = [rng.choice((1, 1, 1, 30)) for _ in self.agents]
        self.events: list[tuple] = []  # (time, agent, whether its row ends, row)
        self.blocked: dict[int, list[tuple[int, Row]]] = {}  # by a counter that is too low
        self.counts: dict[int, int] = {}
        self.memory: dict[tuple, int] = {}

    def run(self) -> str | None:
        done = 0
        for agent in range(len(self.agents)):
            self._claim(0.0, agent)
        while self.events:
            time, agent, ends, _, row = heapq.heappop(self.events)
            problem = self._end(row) if ends else self._begin(row)
            if problem:
                return f"{row}: {problem}"
            if not ends:
                self._at(time, agent, True, row)
                continue
            done += 1
            for counter in row.signals:
                for waiting in self.blocked.pop(counter, ()):
                    self._try(time, *waiting)
            self._claim(time, agent)
        return None if done == len(self.rows) else "stuck"

    def _at(self, time: float, agent: int, ends: bool, row: Row) -> None:
        delay = self.pace[agent] * self.rng.random()
        heapq.heappush(self.events, (time + delay, agent, ends, self.rng.random(), row))

    def _claim(self, time: float, agent: int) -> None:
        if self.agents[agent]:
            self._try(time, agent, self.agents[agent].pop())

    def _try(self, time: float, agent: int, row: Row) -> None:
        for counter, value in row.waits:
            if self.counts.get(counter, 0) < value:
                self.blocked.setdefault(counter, []).append((agent, row))
                return
        self._at(time, agent, False, row)

    def _begin(self, row: Row) -> str | None:
        for region, version in row.reads:
            if self.memory.get(region) != version:
                return f"reads {self.memory.get(region)} of {region}"
        for region, _ in row.writes:
            self.memory[region] = TORN
        return None

    def _end(self, row: Row) -> str | None:
        written = {region for region, _ in row.writes}
        for region, version in row.reads:
            if region not in written and self.memory.get(region) != version:
                return f"{region} changed under its hands"
        for region, version in row.writes:
            if self.memory[region] != TORN:
                return f"{region} is written by two"
            self.memory[region] = version
        for counter in row.signals:
            self.counts[counter] = self.counts.get(counter, 0) + 1
        return None


def _changed(rows: list[Row], at: int, **fields) -> list[Row]:
    return [*rows[:at], dataclasses.replace(rows[at], **fields), *rows[at + 1 :]]


def _without(items: tuple, at: int) -> tuple:
    return (*items[:at], *items[at + 1 :])


def _in_place(items: tuple, at: int, item) -> tuple:
    return (*items[:at], item, *items[at + 1 :])


def _with_wait(rows: list[Row], at: int, rng: random.Random, change: Callable) -> list[Row] | None:
    """One wait of a row changed to what `change` makes of it; None: dropped."""
    waits = rows[at].waits
    if not waits:
        return None
    place = rng.randrange(len(waits))
    wait = change(*waits[place])
    return _changed(rows, at, waits=_in_place(waits, place, wait) if wait else _without(waits, place))


def _counter(rows: list[Row], rng: random.Random) -> int:
    return rng.choice(rng.choice([row for row in rows if row.signals]).signals)


def drop_wait(rows, at, rng):
    return _with_wait(rows, at, rng, lambda counter, value: None)


def lower_wait(rows, at, rng):
    return _with_wait(rows, at, rng, lambda counter, value: (counter, value - rng.randint(1, 3)))


def raise_wait(rows, at, rng):
    return _with_wait(rows, at, rng, lambda counter, value: (counter, value + rng.randint(1, 3)))


def wait_for_another(rows, at, rng):
    return _with_wait(rows, at, rng, lambda counter, value: (_counter(rows, rng), value))


def forget_all_waits(rows, at, rng):
    return _changed(rows, at, waits=()) if len(rows[at].waits) > 1 else None


def drop_signal(rows, at, rng):
    signals = rows[at].signals
    return _changed(rows, at, signals=_without(signals, rng.randrange(len(signals)))) if signals else None


def signal_another(rows, at, rng):
    signals = rows[at].signals
    if not signals:
        return None
    return _changed(rows, at, signals=_in_place(signals, rng.randrange(len(signals)), _counter(rows, rng)))


def signal_twice(rows, at, rng):
    signals = rows[at].signals
    return _changed(rows, at, signals=(*signals, rng.choice(signals))) if signals else None


def swap_neighbours(rows, at, rng):
    """With the next row of the same worker."""
    later = [number for number in range(at + 1, len(rows)) if rows[number].worker == rows[at].worker]
    if not later:
        return None
    swapped = list(rows)
    swapped[at], swapped[later[0]] = rows[later[0]], rows[at]
    return swapped


def move_row(rows, at, rng):
    rest = [*rows[:at], *rows[at + 1 :]]
    to = min(max(at + rng.randint(-12, 12), 0), len(rest))
    return [*rest[:to], rows[at], *rest[to:]] if to != at else None


def drop_row(rows, at, rng):
    return [*rows[:at], *rows[at + 1 :]]


def repeat_row(rows, at, rng):
    return [*rows[: at + 1], *rows[at:]]


def give_to_another(rows, at, rng):
    """Another worker of the table does it, or whoever claims it."""
    worker = rng.choice(rows).worker
    return _changed(rows, at, worker=worker) if worker != rows[at].worker else None


def write_elsewhere(rows, at, rng):
    """The last number of a region is its place among several: a share, a CTA, a parity."""
    writes = rows[at].writes
    if not writes:
        return None
    place = rng.randrange(len(writes))
    (*name, last), version = writes[place]
    return _changed(rows, at, writes=_in_place(writes, place, ((*name, last ^ 1), version)))


def read_elsewhere(rows, at, rng):
    reads = rows[at].reads
    if not reads:
        return None
    place = rng.randrange(len(reads))
    (*name, last), version = reads[place]
    return _changed(rows, at, reads=_in_place(reads, place, ((*name, last ^ 1), version)))


def read_the_version_before(rows, at, rng):
    reads = rows[at].reads
    if not reads:
        return None
    place = rng.randrange(len(reads))
    region, version = reads[place]
    return _changed(rows, at, reads=_in_place(reads, place, (region, version - rng.randint(1, 2))))


def share_of_another(rows, at, rng):
    share = rng.randrange(max(rows[at].shares, 2))
    return _changed(rows, at, share=share) if rows[at].weights and share != rows[at].share else None


def no_fence_in(rows, at, rng):
    return _changed(rows, at, fences_in=False) if rows[at].fences_in else None


def no_fence_out(rows, at, rng):
    return _changed(rows, at, fences_out=False) if rows[at].fences_out else None


KINDS = (
    *(drop_wait, lower_wait, raise_wait, wait_for_another, forget_all_waits, drop_signal, signal_another, signal_twice),
    *(swap_neighbours, move_row, drop_row, repeat_row, give_to_another, write_elsewhere, read_elsewhere),
    *(read_the_version_before, share_of_another, no_fence_in, no_fence_out),
)


def mutants(rows: list[Row], count: int, seed: int):
    """So many (kind, table) of `rows` with one thing wrong, each kind as often as it applies."""
    rng = random.Random(seed)
    made = 0
    while made < count:
        kind = rng.choice(KINDS)
        table = kind(rows, rng.randrange(len(rows)), rng)
        if table is not None and table != rows:
            made += 1
            yield kind.__name__, table
