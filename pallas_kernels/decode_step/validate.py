"""Proves that a table of rows can be run: whatever the workers' speeds, every row reads what it means to read.

Rows are taken in the table's order, each with a vector clock: how far every line of events is known to be done when the
row starts. The rows of a named worker are such a line; so are the signals of a counter, for rows that any thread may
claim. A wait learns what the counted rows knew. Then every access to a region is compared with the last write and with
the reads since.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import no_type_check

import numpy as np
from jaxtyping import Int

from pallas_kernels.decode_step.schedule import COPIES, Row

Clock = Int[np.ndarray, "lines"]
Event = tuple[int, int]  # a line, and a place on it
_NEVER = 2**31 - 1  # from here downward, places that no clock reaches
_FEW = 4
_UNWRITTEN = np.iinfo(np.int64).min  # in place of a version


def validate(rows: list[Row]) -> str | None:
    """Why a table must not be run, naming the row; None if it may."""
    try:
        _Validator(rows).run()
    except _Rejected as error:
        return str(error)
    return _unread_weights(rows)


class _Rejected(Exception):
    pass


def _name(row: Row) -> str:
    of = f" for {row.of.name}" if row.of else ""
    by = f" by {row.worker}" if row.worker else ""
    return f"{row.kind.name}{of} of layer {row.layer}, share {row.share} of {row.shares}{by}"


def _line_of(row: Row) -> tuple:
    return row.worker or ("counter", *row.signals[:1])


@no_type_check  # at run time, for speed: these are called for every row
class _Events:
    """Rows that some other has to come after."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, event: Event) -> None:
        self.events.append(event)
        self._arrays = None

    def are_done(self, clock: Clock, apart_from: Event | None = None) -> bool:
        if len(self.events) <= _FEW:  # quicker than with arrays
            return all(clock[event[0]] >= event[1] or event == apart_from for event in self.events)
        if self._arrays is None:
            lines, places = zip(*self.events)
            self._arrays = np.array(lines), np.array(places)
        lines, places = self._arrays
        is_done = clock[lines] >= places
        return bool(is_done.all()) or all(event == apart_from for event, done in zip(self.events, is_done) if not done)


def _unread_weights(rows: list[Row]) -> str | None:
    """Every share of a matrix is read, and none more often than the others."""
    reads: dict[tuple, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for row in rows:
        if row.weights:
            reads[row.worker[:1], row.of or row.kind, row.layer, row.shares][row.share] += 1
    for (device, kind, layer, shares), counts in reads.items():
        if set(counts) != set(range(shares)) or len(set(counts.values())) != 1:
            return f"{kind.name} of layer {layer} on {device}: shares {dict(counts)} of {shares} weights are read"
    return None


@dataclasses.dataclass(slots=True)
class _Counter:
    """Signals so far in the table's order, and what their rows know; an epoch ends at each value that is waited for."""

    clock: Clock
    count: int = 0
    epoch: _Events = dataclasses.field(default_factory=_Events)  # the rows that have counted since the last value
    last: _Events = dataclasses.field(default_factory=_Events)  # and in the epoch before


@dataclasses.dataclass(slots=True)
class _Readers:
    """Rows that share one tuple of accesses."""

    regions: Int[np.ndarray, "regions"]
    versions: Int[np.ndarray, "regions"]
    last: Row
    events: _Events = dataclasses.field(default_factory=_Events)
    is_fenced: bool = True  # for copies that overwrite what they read


@no_type_check  # at run time, for speed: these are called for every row
class _Validator:
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.lines = {line: at for at, line in enumerate(dict.fromkeys(map(_line_of, rows)))}
        self.clocks: dict[tuple, Clock] = {}  # of named workers
        self.silent = 0  # rows so far that nobody can wait for
        self.counters = {counter: _Counter(self._nothing()) for row in rows for counter in row.signals}
        self.left = collections.Counter(wait for row in rows for wait in row.waits)  # rows that have yet to wait for it
        self.reached: dict[tuple[int, int], Clock] = {}  # a wait -> what is known after it
        # Regions: what they hold, which row wrote it, and who has read it.
        self.regions = {region: at for at, region in enumerate(dict.fromkeys(r for row in rows for r, _ in row.writes))}
        self.held = np.full(len(self.regions), _UNWRITTEN)
        self.events = np.zeros((2, len(self.regions)), np.int64)
        self.writers: list[Row | None] = [None] * len(self.regions)
        self.is_copied, self.is_fenced = np.zeros((2, len(self.regions)), bool)
        self.readers: list[list[_Readers]] = [[] for _ in self.regions]
        self.sharing = collections.Counter(id(row.reads) for row in rows)
        self.shared: dict[int, _Readers] = {}

    def run(self) -> None:
        for row in self.rows:
            clock = self._start(row)
            event = self._event(row, clock)
            if row.reads:
                self._read(row, clock, event)
            for region, version in row.writes:
                self._write(row, clock, event, self.regions[region], version)
            if row.worker:
                clock[event[0]] = event[1]
            for counter in row.signals:
                self._signal(row, clock, event, counter)

    def _nothing(self) -> Clock:
        return np.zeros(len(self.lines), np.int32)

    def _start(self, row: Row) -> Clock:
        """What is done when the row starts. A named worker's clock goes on from row to row."""
        clock = self.clocks.get(row.worker)
        if clock is None:
            clock = self._nothing()
            if row.worker:
                self.clocks[row.worker] = clock
        for wait in row.waits:
            if wait[1] <= 0:
                continue
            if wait not in self.reached:
                raise _Rejected(f"{_name(row)} waits for {wait[1]} of counter {wait[0]}: no rows before it reach that")
            np.maximum(clock, self.reached[wait], out=clock)
            self.left[wait] -= 1
            if not self.left[wait]:
                del self.reached[wait]
        return clock

    def _event(self, row: Row, clock: Clock) -> Event:
        """The row's place on its line. One that neither has a worker nor signals is never known to be done."""
        line = self.lines[_line_of(row)]
        if row.worker:
            return line, int(clock[line]) + 1
        if row.signals:
            return line, self.counters[row.signals[0]].count + 1
        self.silent += 1
        return line, _NEVER - self.silent

    def _read(self, row: Row, clock: Clock, event: Event) -> None:
        readers = self._readers(row)
        regions = readers.regions
        is_held = self.held[regions] == readers.versions
        if not is_held.all():
            at = int(np.argmin(is_held))
            region, version = row.reads[at]
            found = f"holds {self.held[regions[at]]}" if self.writers[regions[at]] else "nobody has written"
            raise _Rejected(f"{_name(row)} reads version {version} of {region}, which {found}")
        is_done = clock[self.events[0, regions]] >= self.events[1, regions]
        if not is_done.all():
            self._reject(row, "may read too early", int(regions[np.argmin(is_done)]))
        if row.kind in COPIES:
            is_visible = self.is_copied[regions] | (self.is_fenced[regions] & row.fences_in)
            if not is_visible.all():
                self._reject(row, "copies, without both fences,", int(regions[np.argmin(is_visible)]))
        readers.events.add(event)
        readers.last = row
        readers.is_fenced &= row.fences_out or row.kind in COPIES

    def _readers(self, row: Row) -> _Readers:
        """The rows that read the same, from the first to the last of them."""
        key = id(row.reads)
        readers = self.shared.get(key)
        if readers is None:
            try:
                numbers = [self.regions[region] for region, _ in row.reads]
            except KeyError as error:
                raise _Rejected(f"{_name(row)} reads {error.args[0]}, which nobody writes") from None
            readers = _Readers(np.array(numbers), np.array([version for _, version in row.reads]), row)
            for at in numbers:
                self.readers[at].append(readers)
            if self.sharing[key] > 1:
                self.shared[key] = readers
        self.sharing[key] -= 1
        if not self.sharing[key]:
            self.shared.pop(key, None)
        return readers

    def _write(self, row: Row, clock: Clock, event: Event, at: int, version: int) -> None:
        if version <= self.held[at]:
            raise _Rejected(f"{_name(row)} writes version {version} of {self._region(at)} after {self.held[at]}")
        writer = self.writers[at]
        if writer is not None:
            if clock[self.events[0, at]] < self.events[1, at]:
                self._reject(row, "may write too early", at)
            if row.kind in COPIES and not (self.is_copied[at] or (self.is_fenced[at] and row.fences_in)):
                self._reject(row, "overwrites by a copy, without both fences,", at)
        for readers in self.readers[at]:
            if not readers.events.are_done(clock, apart_from=event):
                raise _Rejected(
                    f"{_name(row)} may overwrite {self._region(at)} while {_name(readers.last)} or another reads it"
                )
            if row.kind in COPIES and not (readers.is_fenced and row.fences_in):
                raise _Rejected(
                    f"{_name(row)} overwrites {self._region(at)} by a copy, without both fences, after "
                    f"{_name(readers.last)} read it"
                )
        self.held[at], self.events[:, at], self.writers[at] = version, event, row
        self.is_copied[at], self.is_fenced[at] = row.kind in COPIES, row.fences_out
        self.readers[at] = []

    def _signal(self, row: Row, clock: Clock, event: Event, number: int) -> None:
        """An epoch ends where some row waits for it. Those who count later must know that it has ended."""
        counter = self.counters[number]
        if not counter.last.are_done(clock):
            raise _Rejected(f"{_name(row)} may count on counter {number} before others have, which rows wait for")
        counter.count += 1
        counter.epoch.add(event)
        np.maximum(counter.clock, clock, out=counter.clock)
        wait = (number, counter.count)
        if wait in self.left:
            counter.last, counter.epoch = counter.epoch, _Events()
            self.reached[wait] = counter.clock.copy()
            if (line := self.lines.get(("counter", number))) is not None:
                self.reached[wait][line] = counter.count

    def _region(self, at: int) -> tuple:
        return list(self.regions)[at]

    def _reject(self, row: Row, does: str, at: int) -> None:
        writer = self.writers[at]
        raise _Rejected(f"{_name(row)} {does} {self._region(at)}, which {_name(writer)} writes" if writer else "")
