"""How long a table of rows would take at stated costs. Projected: no figure here or from here is a measurement.

Rows are taken in the table's order, which is one in which they can run. A worker does its own one after the other;
threads claim the next row when they are free. A row starts when its worker and its waits allow, and what it waited for
last is remembered: followed back from the row that ends last, that is the chain which the round's length is made of.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Callable, Mapping
from typing import no_type_check

from pallas_kernels.decode_step.schedule import Kind, Row

# Bytes of a weight as MiMo-V2.5-Pro is published: QKV and the dense MLP in FP8, experts in MXFP4 with their scales.
PUBLISHED_BYTES = {
    Kind.QKV: 1.0,
    Kind.OUTPUT: 2.0,
    Kind.GATE_UP: 1.0,
    Kind.DOWN: 1.0,
    Kind.ROUTER: 4.0,
    Kind.EXPERT_GATE_UP: 4.25 / 8,
    Kind.EXPERT_DOWN: 4.25 / 8,
    Kind.HEAD: 2.0,
}


@dataclasses.dataclass(frozen=True)
class Costs:
    """Times in microseconds; rates per microsecond, of one worker."""

    bandwidth: float  # peak bytes of weights that one CTA, or one thread, gets from memory
    efficiency: float  # share of the peak that is reached
    bytes_per_weight: Mapping[Kind, float]
    speedup: Mapping[Kind, float]  # how much faster than memory weights are used that have been loaded; default 1
    fixed: Mapping[Kind, float]  # of a row, beside its weights; default `overhead`
    overhead: float
    local: float  # from a signal to a row that waits for it in the same CTA
    signal: float  # or elsewhere on the device
    hop: float  # or on another device
    products: float = float("inf")  # multiply-adds
    ring: float = 0.0  # bytes that a CTA can load ahead
    threads: int = 0  # that claim rows without a worker


# An SM of an H200 at a short context, as rows of the kernel took there on one device with an eighth of V2.5-Pro
# (docs/results/nvidia-h200-2026-11-26.json); a round's length comes out within 3 %. Between devices nothing was
# measured: `hop` and SEND are assumed.
HOPPER = Costs(
    bandwidth=4.8e6 / 132,
    efficiency=0.87,  # of the head, which does nothing but stream
    bytes_per_weight=PUBLISHED_BYTES | {Kind.ROUTER: 6.0},  # of three bf16 pieces
    speedup=dict.fromkeys(PUBLISHED_BYTES, 1.15) | {Kind.ROUTER: 3.0, Kind.EXPERT_GATE_UP: 0.93, Kind.EXPERT_DOWN: 1.0},
    fixed={
        Kind.LOAD: 1.0,  # from asking to the first byte
        Kind.FETCH: 1.2,  # of the first part; the others arrive behind products
        Kind.EMBED: 4.6,
        Kind.REDUCE: 2.3,
        Kind.ATTEND: 7.6,
        Kind.MERGE: 3.7,
        Kind.TOP_K: 3.7,
        Kind.SEND: 0.2,
        Kind.PICK: 1.5,
        # Of products: the first slot's way through the warps, sums over teams, stores and what a signal waits for.
        Kind.QKV: 2.0,
        Kind.OUTPUT: 0.9,
        Kind.GATE_UP: 2.0,
        Kind.DOWN: 0.9,
        Kind.ROUTER: 2.6,
        Kind.EXPERT_GATE_UP: 3.2,
        Kind.EXPERT_DOWN: 0.9,
        Kind.HEAD: 2.0,
    },
    overhead=0.1,
    local=0.05,
    signal=0.42,
    hop=1.5,
    ring=104e3,  # eight slots
)
# Each of two cores of a server, about as a trial found them: what it reads, and 65,536 products per microsecond.
CPU = Costs(
    bandwidth=21e3,
    efficiency=1.0,
    bytes_per_weight=PUBLISHED_BYTES,
    speedup={},
    fixed={},
    overhead=0.3,
    local=0.2,
    signal=0.2,
    hop=0.2,
    products=65_536.0,
    threads=2,
)


def _halved(*kinds: Kind) -> Callable[[Costs], Costs]:
    def change(costs: Costs) -> Costs:
        own = {kind: costs.fixed[kind] / 2 for kind in kinds if kind in costs.fixed}
        return dataclasses.replace(costs, fixed={**costs.fixed, **own})

    return change


# What might be better, and the costs then: a round's sensitivity to each.
EASED: dict[str, Callable[[Costs], Costs]] = {
    "a tenth more of the bandwidth": lambda costs: dataclasses.replace(costs, efficiency=1.1 * costs.efficiency),
    "experts' weights used 1.25 times as fast": lambda costs: dataclasses.replace(
        costs,
        speedup={kind: 1.25 if kind in _EXPERTS else speed for kind, speed in costs.speedup.items()},
    ),
    "signals in half the time": lambda costs: dataclasses.replace(costs, signal=costs.signal / 2),
    "hops in half the time": lambda costs: dataclasses.replace(costs, hop=costs.hop / 2),
    "half of fetching": _halved(Kind.FETCH),
    "half of what dense products take beside weights": _halved(Kind.QKV, Kind.OUTPUT, Kind.GATE_UP, Kind.DOWN),
    "half of attention": _halved(Kind.ATTEND, Kind.MERGE),
    "half of adding to the stream": _halved(Kind.REDUCE),
    "half of routing": _halved(Kind.ROUTER, Kind.TOP_K),
    "half of what experts take beside weights": _halved(Kind.EXPERT_GATE_UP, Kind.EXPERT_DOWN),
}
_EXPERTS = (Kind.EXPERT_GATE_UP, Kind.EXPERT_DOWN)


@dataclasses.dataclass(frozen=True)
class Span:
    """A link of the chain: from when its cause had happened, a row waited for the signal, then worked until `end`."""

    row: int
    start: float
    work: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Projected: when each row starts and ends, in microseconds, and what the round's length is made of."""

    rows: list[Row]
    workers: list[tuple]  # that ran each row
    starts: list[float]
    ends: list[float]
    roofline: float  # microseconds: a device's weights at peak bandwidth
    chain: list[Span]  # first to last

    @property
    def round(self) -> float:
        return max(self.ends)

    @property
    def share(self) -> float:
        """Of the roofline."""
        return self.roofline / self.round

    def exposed(self) -> dict[int, dict[str, float]]:
        """Per layer, what the chain's microseconds went to: kinds of rows, and signals on their way."""
        parts: dict[int, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
        for span in self.chain:
            layer = parts[layer_of(self.rows[span.row])]
            layer[self.rows[span.row].kind.name] += span.end - span.work
            layer["signal"] += span.work - span.start
        return {layer: dict(kinds) for layer, kinds in parts.items()}


def sensitivity(timeline: Timeline, costs: Costs) -> dict[str, float]:
    """By how many microseconds each of `EASED` would shorten a round, which took so long at these costs."""
    eased = {name: simulate(timeline.rows, ease(costs)) for name, ease in EASED.items()}
    return {name: timeline.round - better.round for name, better in eased.items()}


END = -1  # in place of a layer's number: the head, and what comes after it


def layer_of(row: Row) -> int:
    """Norms are numbered through, two per layer; what stands after the layers has no number."""
    kind = row.of or row.kind
    if kind in (Kind.HEAD, Kind.PICK):
        return END
    return row.layer // 2 if kind in (Kind.NORM, Kind.REDUCE) else row.layer


def simulate(rows: list[Row], costs: Costs) -> Timeline:
    """Projected times of a table that `validate` accepts."""
    simulation = _Simulation(rows, costs)
    for number, row in enumerate(rows):
        simulation.run(number, row)
    return Timeline(
        rows, simulation.workers, simulation.starts, simulation.ends, simulation.roofline(), simulation.chain()
    )


@dataclasses.dataclass(slots=True)
class _Stream:
    """The weights that a CTA loads: of its newest load, what was loaded before the product began."""

    row: int = -1
    nbytes: float = 0.0
    ahead_until: float = 0.0  # when as much is there as the ring holds
    product: int = -1  # the row that used the load before


_NOTHING = (0.0, -1)  # a time, and the row that it was caused by


@no_type_check  # at run time, for speed: these are called for every row
class _Simulation:
    def __init__(self, rows: list[Row], costs: Costs) -> None:
        self.rows, self.costs, self.rate = rows, costs, costs.bandwidth * costs.efficiency
        self.workers, self.starts, self.ends = [row.worker for row in rows], [0.0] * len(rows), [0.0] * len(rows)
        self.causes = [_NOTHING] * len(rows)
        self.free: dict[tuple, tuple[float, int]] = {}  # worker -> since when, and the row before
        self.threads = [(0.0, ("thread", number)) for number in range(costs.threads)]
        self.streams: dict[tuple, _Stream] = collections.defaultdict(_Stream)  # by CTA
        self.counts: collections.Counter[int] = collections.Counter()
        self.counted: dict[int, tuple[float, int]] = {}
        self.reached: dict[tuple[int, int], tuple[float, int]] = {}
        self.awaited = {wait for row in rows for wait in row.waits}
        self.homes: dict[int, tuple] = {}  # counter -> where those are who wait for it: one CTA, or all of a device
        for row in rows:
            for counter, _ in row.waits:
                home = self.homes.setdefault(counter, row.worker[:2])
                if home != row.worker[:2]:
                    self.homes[counter] = row.worker[:1]

    def run(self, number: int, row: Row) -> None:
        worker = row.worker
        if not worker:
            _, worker = heapq.heappop(self.threads)
            self.workers[number] = worker
        cause = self.free.get(worker, _NOTHING)
        for wait in row.waits:
            cause = max(cause, self.reached.get(wait, _NOTHING))
        if row.kind == Kind.LOAD:
            signalled, end = self._load(number, row, cause)
        else:
            self.starts[number], self.causes[number] = cause[0], cause
            signalled = end = self._work(number, row)
        self.ends[number] = end
        self.free[worker] = (end, number)
        if not row.worker:
            heapq.heappush(self.threads, (end, worker))
        for counter in row.signals:
            self._signal(number, row, counter, signalled)

    def _signal(self, number: int, row: Row, counter: int, time: float) -> None:
        home = self.homes.get(counter, row.worker[:2])
        if home == row.worker[:2]:
            latency = self.costs.local
        else:
            latency = self.costs.signal if home[:1] == row.worker[:1] else self.costs.hop
        self.counts[counter] += 1
        self.counted[counter] = max(self.counted.get(counter, _NOTHING), (time + latency, number))
        wait = (counter, self.counts[counter])
        if wait in self.awaited:
            self.reached[wait] = self.counted[counter]

    def _nbytes(self, row: Row) -> float:
        return row.weights * self.costs.bytes_per_weight.get(row.of or row.kind, 1.0)

    def _work(self, number: int, row: Row) -> float:
        """When a row that is no load ends."""
        start = self.starts[number]
        fixed = self.costs.fixed.get(row.kind, self.costs.overhead)
        stream = self.streams.get(row.worker[:2])
        if stream is None or row.kind != self.rows[stream.row].of:
            return start + fixed + max(self._nbytes(row) / self.rate, row.products / self.costs.products)
        return fixed + self._use(number, row, stream)

    def _load(self, number: int, row: Row, cause: tuple[float, int]) -> tuple[float, float]:
        """When the first weights are there, and when as many are as the ring has room for."""
        stream, costs = self.streams[row.worker[:2]], self.costs
        is_idle = cause[0] > self.free.get(row.worker, _NOTHING)[0]
        start = cause[0] + (costs.fixed.get(Kind.LOAD, costs.overhead) if is_idle else 0.0)
        nbytes = self._nbytes(row)
        ahead = min(nbytes, costs.ring)
        # What the load before has left in the ring makes room once its product begins.
        at_once = min(ahead, costs.ring - min(stream.nbytes, costs.ring))
        until = start + at_once / self.rate
        if ahead > at_once and stream.product >= 0 and self.starts[stream.product] > until:
            until, cause = self.starts[stream.product], (self.starts[stream.product], stream.product)
        self.starts[number], self.causes[number] = start, cause
        stream.row, stream.nbytes = number, nbytes
        stream.ahead_until = until + (ahead - at_once) / self.rate
        return start, stream.ahead_until

    def _use(self, number: int, row: Row, stream: _Stream) -> float:
        """When the product of what was loaded ends: what the ring did not hold arrives while it is used."""
        start, rest = self.starts[number], stream.nbytes - min(stream.nbytes, self.costs.ring)
        loaded = max(stream.ahead_until, start if rest else 0.0) + rest / self.rate
        used = start + stream.nbytes / (self.rate * self.costs.speedup.get(row.kind, 1.0))
        if loaded > used and stream.ahead_until > start:
            self.causes[number] = (loaded, stream.row)
        self.ends[stream.row] = loaded
        self.free[self.rows[stream.row].worker] = (loaded, stream.row)
        stream.product = number
        return max(loaded, used)

    def roofline(self) -> float:
        devices: dict[tuple, float] = collections.defaultdict(float)
        for row in self.rows:
            devices[row.worker[:1]] += self._nbytes(row)
        loaders = {worker for worker, row in zip(self.workers, self.rows) if row.weights}
        together = max(1, len(loaders) // len(devices))
        return max(devices.values()) / (self.costs.bandwidth * together)

    def chain(self) -> list[Span]:
        """From the row that ends last back to one that waited for nothing."""
        spans, number = [], max(range(len(self.rows)), key=self.ends.__getitem__)
        until = self.ends[number]
        while number >= 0:
            cause = self.causes[number][1]
            before = min(self.ends[cause], until) if cause >= 0 else 0.0
            spans.append(Span(number, before, min(max(self.starts[number], before), until), until))
            number, until = cause, before
        return spans[::-1]
