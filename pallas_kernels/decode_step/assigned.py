"""Rows of a step on Hopper: the phases of `schedule`, split over workers that each own theirs.

A worker is (device, CTA, role). A CTA's consumers compute; beside them three warps make copies: `weights` runs ahead
and fills a ring, `fetch` brings what other CTAs made into a page of shared memory, `send` carries partial sums to every
device. Devices share heads, features and vocabulary; embedding and router are whole on each.

A CTA owns columns of the residual stream: it alone computes what is added to them, and adds it. So a sum over devices
joins a CTA with the CTAs of the same number, and on one device it never leaves its CTA.

What may be overwritten when is written down in waits only, and `validate` proves that they suffice. Buffers with two
places are used in turn (parity): the ring, the pages, what is sent, and the parts that devices add up.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, no_type_check

from pallas_kernels.decode_step.geometry import Target
from pallas_kernels.decode_step.schedule import Kind, Phase, Row

CTAS = 132  # of a Hopper GPU: one per SM
ROLES = ("consume", "weights", "fetch", "send")
QUERY_ROWS = 16  # pairs of a query head and a token, all of one key head, that are a unit of attention or merging
PARITY = 2

Place = tuple[int, int]  # device, CTA
Wait = tuple[int, int]  # counter, value
Access = tuple[tuple, int]  # region, version


def shard_of(target: Target, devices: int) -> Target:
    """The model as each of `devices` sees it; a key/value head that does not divide is held more than once."""
    return dataclasses.replace(
        target,
        vocab=target.vocab // devices,
        heads=target.heads // devices,
        global_kv_heads=max(1, target.global_kv_heads // devices),
        sliding_kv_heads=max(1, target.sliding_kv_heads // devices),
        features=target.features // devices,
        expert_features=target.expert_features // devices,
        chunks=max(1, target.chunks // devices),
    )


class Assigned(NamedTuple):
    """Rows, and what each counter counts: a buffer's name, the device, and whose it is if it belongs to one CTA."""

    rows: list[Row]
    counters: dict[tuple, int]


def assigned_table(phases: Iterable[Phase], devices: int, ctas: int = CTAS) -> Assigned:
    """Rows of a step's `phases`, which are those of one device (`shard_of`), on each of `devices`."""
    table = _Table(devices, ctas)
    for phase in phases:
        table.add(phase)
    return Assigned(table.rows, table.counters)


def assigned_rows(phases: Iterable[Phase], devices: int, ctas: int = CTAS) -> list[Row]:
    """Those of `assigned_table`."""
    return assigned_table(phases, devices, ctas).rows


@dataclasses.dataclass
class _Cta:
    """What was emitted for one CTA so far. A place is free again after so many of its consumer rows (`freed`)."""

    consumed: int = 0
    fetches: int = 0
    loads: int = 0
    routes: int = 0  # the version of its list of experts
    routed: int = 0  # consumer rows until that list was made
    page_freed: list[int] = dataclasses.field(default_factory=lambda: [0] * PARITY)
    ring_freed: list[int] = dataclasses.field(default_factory=lambda: [0] * PARITY)


@no_type_check  # at run time, for speed: these are called for every row
class _Table:
    """Emits the rows of one phase after the other; a phase's number is the version of what it writes."""

    def __init__(self, devices: int, ctas: int) -> None:
        self.devices, self.ctas = devices, ctas
        self.rows: list[Row] = []
        self.number = self.parts = 0  # phases, and those among them that leave parts to be added
        self.counters: dict[tuple, int] = {}
        self.counts: collections.Counter[int] = collections.Counter()  # what counters reach with the rows so far
        self.pieces: dict[tuple, tuple[Access, ...]] = {}  # (buffer, device) -> all of it, one object for all readers
        self.cta = {place: _Cta() for place in self.places(ctas)}

    def add(self, phase: Phase) -> None:
        self.number += 1
        if phase.kind == Kind.EMBED:
            return  # the first norm does it
        tiles = min(self.ctas, phase.units * math.ceil(phase.queries / QUERY_ROWS / max(1, phase.units)))
        if phase.kind == Kind.NORM:
            self._reduce(phase)
        elif phase.weights:
            self._multiply(phase)
        elif phase.kind == Kind.TOP_K:
            self._choose(phase)
        elif phase.kind == Kind.PICK:
            self._pick(phase)
        elif phase.is_global:  # by heads and keys, then merged by queries
            parts = min(self.ctas, phase.units * max(1, self.ctas // phase.units))
            self._spread(phase, phase.kind, parts, phase.reads[0], "partial")
            self._spread(phase, Kind.MERGE, min(self.ctas, phase.queries), "partial", phase.writes)
        else:
            self._spread(phase, phase.kind, tiles, phase.reads[0], phase.writes)

    def places(self, ctas: int) -> Iterator[Place]:
        return ((device, cta) for device in range(self.devices) for cta in range(ctas))

    def _spread(self, phase: Phase, kind: Kind, shares: int, reads: str, writes: str) -> None:
        """A share for each of so many CTAs, which load what they need of a buffer in global memory."""
        for place in self.places(shares):
            device, cta = place
            waits, made = (self._reached(reads, device),), (self._counter(writes, device),)
            written = (((writes, device, cta), self.number),)
            self._consume(place, phase, kind, waits, self.pieces[reads, device], written, made, shares)
        self._publish(writes, [(cta,) for cta in range(shares)])

    def _reduce(self, phase: Phase) -> None:
        """Each CTA adds the devices' parts to its columns of the stream, which it alone keeps, and shows the sum.

        The first time there is nothing to be added: it looks the tokens up.
        """
        kind = Kind.REDUCE if self.parts else Kind.EMBED
        for place in self.places(self.ctas):
            device, cta = place
            waits = (self._reached("part", *place),) if ("part", *place) in self.counters else ()
            reads = self.pieces["part", device, cta] if self.parts else ()
            written = ((("stream", *place), self.number),)
            self._consume(place, phase, kind, waits, reads, written, (self._counter("stream", device),))
        self._publish("stream", [(cta,) for cta in range(self.ctas)])

    def _choose(self, phase: Phase) -> None:
        """Each CTA lists the active experts for itself, in shared memory."""
        for place in self.places(self.ctas):
            waits, reads = (self._reached("scores", place[0]),), self.pieces["scores", place[0]]
            self._consume(place, phase, phase.kind, waits, reads, ((("routes", *place), self.number),))
            cta = self.cta[place]
            cta.routes, cta.routed = self.number, cta.consumed

    def _pick(self, phase: Phase) -> None:
        """Each CTA finds the largest of the logits that it made, then one of them the largest of all."""
        for place in self.places(self.ctas):
            reads = ((("logits", *place), self.number - 1),)
            written = ((("candidates", *place), self.number),)
            self._consume(place, phase, Kind.PICK, (), reads, written, (self._counter("candidates", place[0]),))
        self._publish("candidates", [(cta,) for cta in range(self.ctas)])
        self._spread(phase, Kind.PICK_BEST, 1, "candidates", phase.writes)

    def _multiply(self, phase: Phase) -> None:
        """By weights that were loaded ahead. What is added to the stream goes to every device's CTA that owns it."""
        leaves_part = phase.writes == "part"
        is_sent = leaves_part and self.devices > 1
        self.parts += leaves_part
        parity = self.parts % PARITY
        for place in self.places(self.ctas):
            device, cta = place
            fetched, reads = self._page(place, phase)
            loaded, slot = self._load(place, phase)
            region = (phase.writes, device, cta)
            if leaves_part:
                region = ("stage", *place, parity) if is_sent else ("part", device, parity, device, cta)
            made = () if leaves_part else (self._counter(phase.writes, device),)
            self._consume(place, phase, phase.kind, (*fetched, loaded), (*reads, slot), ((region, self.number),), made)
            self.cta[place].ring_freed[slot[0][-1]] = self.cta[place].consumed
            if is_sent:
                self._send(place, phase, parity)
        if not leaves_part:
            self._publish(phase.writes, [(cta,) for cta in range(self.ctas)])
            return
        for device, cta in self.places(self.ctas):
            sources = range(self.devices) if is_sent else (device,)
            mine = tuple((("part", device, parity, source, cta), self.number) for source in sources)
            self.pieces["part", device, cta] = mine

    def _page(self, place: Place, phase: Phase) -> tuple[tuple[Wait, ...], tuple[Access, ...]]:
        """A product's input in shared memory, and the list of experts where it is by experts."""
        cta = self.cta[place]
        waits, reads = self._fetch(place, phase, "stream" if phase.reads[0] == "normed" else phase.reads[0])
        return waits, (*reads, (("routes", *place), cta.routes)) if "routes" in phase.reads else reads

    def _fetch(self, place: Place, phase: Phase, buffer: str) -> tuple[tuple[Wait, ...], tuple[Access, ...]]:
        """Copies a buffer to the page that the next consumer row reads."""
        cta, device = self.cta[place], place[0]
        cta.fetches += 1
        parity = cta.fetches % PARITY
        waits = (self._reached(buffer, device), *self._freed(place, cta.page_freed[parity]))
        page = ((("page", *place, parity), cta.fetches),)
        done = self._counter("fetched", *place)
        self._copy(place, "fetch", Kind.FETCH, phase, waits, self.pieces[buffer, device], page, (done,))
        cta.page_freed[parity] = cta.consumed + 1
        return ((done, cta.fetches),), page

    def _load(self, place: Place, phase: Phase) -> tuple[Wait, Access]:
        """Copies a CTA's share of the weights to the ring; which experts' is known when they are listed."""
        cta = self.cta[place]
        cta.loads += 1
        parity, is_routed = cta.loads % PARITY, "routes" in phase.reads
        waits = self._freed(place, max(cta.ring_freed[parity], cta.routed if is_routed else 0))
        reads = ((("routes", *place), cta.routes),) if is_routed else ()
        slot, done = (("ring", *place, parity), cta.loads), self._counter("loaded", *place)
        self._copy(place, "weights", Kind.LOAD, phase, waits, reads, (slot,), (done,))
        return (done, cta.loads), slot

    def _send(self, place: Place, phase: Phase, parity: int) -> None:
        reads = ((("stage", *place, parity), self.number),)
        writes = tuple((("part", peer, parity, *place), self.number) for peer in range(self.devices))
        arrived = tuple(self._counter("part", peer, place[1]) for peer in range(self.devices))
        self._copy(
            place, "send", Kind.SEND, phase, self._freed(place, self.cta[place].consumed), reads, writes, arrived
        )

    def _freed(self, place: Place, consumed: int) -> tuple[Wait, ...]:
        """The wait for so many of a CTA's consumer rows."""
        return ((self._counter("consumed", *place), consumed),) if consumed else ()

    def _consume(self, place, phase, kind, waits, reads, writes, made=(), shares=0) -> None:
        self.cta[place].consumed += 1
        signals = (self._counter("consumed", *place), *made)
        work = (kind, phase.layer, place[1], shares or self.ctas, waits, signals, reads, writes)
        self._emit(Row(*work, worker=(*place, "consume"), fences_out=True))

    def _copy(self, place, role, kind, phase, waits, reads, writes, signals) -> None:
        share, shares = place[1], self.ctas
        weights = phase.weights * (share + 1) // shares - phase.weights * share // shares if kind == Kind.LOAD else 0
        work = (kind, phase.layer, share, shares, waits, signals, reads, writes)
        self._emit(Row(*work, worker=(*place, role), of=phase.kind, weights=weights, fences_in=True))

    def _emit(self, row: Row) -> None:
        self.rows.append(row)
        for counter in row.signals:
            self.counts[counter] += 1

    def _publish(self, buffer: str, pieces: list[tuple]) -> None:
        """All CTAs of a device read what its CTAs, or all devices', have written."""
        for device in range(self.devices):
            self.pieces[buffer, device] = tuple(((buffer, device, *piece), self.number) for piece in pieces)

    def _counter(self, *name) -> int:
        return self.counters.setdefault(name, len(self.counters))

    def _reached(self, *name) -> Wait:
        """The wait for all that was counted so far."""
        return self._counter(*name), self.counts[self._counter(*name)]
