"""The table that a kernel walks: the consumers' rows of each CTA, and what their copies wait for.

All devices have the same table, since each has counters of its own. Of an assigned row's waits those are left that
cross CTAs; within a CTA barriers in shared memory take the others' place.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from typing import NamedTuple

import numpy as np

from pallas_kernels.decode_step import schedule
from pallas_kernels.decode_step.assigned import assigned_table
from pallas_kernels.decode_step.hopper import roles
from pallas_kernels.decode_step.hopper.config import FORMATS, ROWS
from pallas_kernels.decode_step.hopper.plan import StepPlan
from pallas_kernels.decode_step.schedule import Kind

EPOCH = 0  # the counter of rounds
SHARED = ("epoch", "stream", "qkv", "partial", "attended", "scores", "hidden", "logits", "candidates", "picked")
LOCAL = {"consumed", "fetched", "loaded"}  # counters of one CTA


class Op(enum.IntEnum):
    """What a row of the kernel's table is: a `Kind`, but attention to a window is a program of its own."""

    EMBED = Kind.EMBED
    REDUCE = Kind.REDUCE
    QKV = Kind.QKV
    ATTEND = Kind.ATTEND
    MERGE = Kind.MERGE
    OUTPUT = Kind.OUTPUT
    GATE_UP = Kind.GATE_UP
    DOWN = Kind.DOWN
    ROUTER = Kind.ROUTER
    TOP_K = Kind.TOP_K
    EXPERT_GATE_UP = Kind.EXPERT_GATE_UP
    EXPERT_DOWN = Kind.EXPERT_DOWN
    HEAD = Kind.HEAD
    PICK = Kind.PICK
    PICK_BEST = Kind.PICK_BEST
    ATTEND_WINDOW = 40  # a sliding layer's


class Table(NamedTuple):
    """The rows int32 [ctas, rows, roles.FIELDS], and where a launch may begin.

    Row n of all CTAs is of the same phase. What one row hands on to the next in shared memory ends with each layer, so
    a launch runs whole layers; the first start is 0, and after the last layer comes the head.
    """

    rows: np.ndarray
    starts: tuple[int, ...]


def counters_of(plan: StepPlan) -> int:
    """How many a table counts on: those of all CTAs, and one of each."""
    return len(SHARED) + plan.ctas


def table_of(plan: StepPlan) -> Table:
    """A round of the target."""
    return _Table(plan).run()


class _Table:
    def __init__(self, plan: StepPlan) -> None:
        self.plan, self.layers = plan, plan.target.layers
        phases = schedule.step_phases(plan.target, plan.tokens)
        self.rows, counters = assigned_table(phases, plan.devices, plan.ctas)
        self.names = {number: name[:1] + name[2:] for name, number in counters.items()}  # without the device
        counts = collections.Counter(self.names[counter] for row in self.rows for counter in row.signals)
        self.per_round = {name: count // plan.devices for name, count in counts.items()}
        self.places: dict[tuple, int] = {}  # (kind, layer) -> its row
        self.lists: list[dict[int, roles.Row]] = [{} for _ in range(plan.ctas)]

    def run(self) -> Table:
        waits: dict[int, list[tuple]] = collections.defaultdict(list)  # of a CTA's copies, for its next row
        for row in self.rows:
            device, cta, role = row.worker
            if device:
                continue
            crossing = [(self.names[counter], value) for counter, value in row.waits]
            crossing = [wait for wait in crossing if wait[0][0] not in LOCAL]
            if role == "send":
                last = max(self.lists[cta])
                arrived = self.number(self.names[row.signals[0]])
                self.lists[cta][last] = dataclasses.replace(self.lists[cta][last], arrived=arrived)
            elif role == "consume":
                place = self.places.setdefault((row.kind, row.layer), len(self.places))
                self.lists[cta][place] = self.row(row, waits.pop(cta, []) + crossing)
            else:
                waits[cta] += crossing
        nothing = roles.Row(roles.NOTHING)
        lists = [[rows.get(place, nothing) for place in range(len(self.places))] for rows in self.lists]
        starts = [place for (kind, layer), place in self.places.items() if kind in (Kind.QKV, Kind.HEAD) and place > 1]
        return Table(roles.encode(lists), (0, *starts))

    def number(self, name: tuple) -> int:
        return len(SHARED) + name[1] if name[0] == "part" else SHARED.index(name[0])

    def row(self, row: schedule.Row, waits: list[tuple]) -> roles.Row:
        first, last = self.share(row)
        found = roles.Row(self.op(row), self.layer(row), first, last, parity=_parity(row))
        if row.kind in (Kind.EMBED, Kind.REDUCE):
            reader = FORMATS.index(self.plan.reads(self.reader(row.layer)))
            found = dataclasses.replace(found, reader=reader, tap=self.tap(row))
        if waits:
            ((name, value),) = set(waits)
            found = dataclasses.replace(found, wait=self.number(name), value=value, per_round=self.per_round[name])
        for counter in row.signals:
            if (name := self.names[counter])[0] not in LOCAL:
                found = dataclasses.replace(found, signal=self.number(name))
        return found

    def op(self, row: schedule.Row) -> Op:
        if row.kind == Kind.ATTEND and self.layers[row.layer].is_sliding:
            return Op.ATTEND_WINDOW
        return Op(row.kind)

    def reader(self, norm: int) -> Kind:
        """The product that reads the stream after a norm."""
        if norm == 2 * len(self.layers):
            return Kind.HEAD
        if norm % 2 == 0:
            return Kind.QKV
        return Kind.EXPERT_GATE_UP if self.layers[norm // 2].has_experts else Kind.GATE_UP

    def layer(self, row: schedule.Row) -> int:
        """The layer's place in the stack that the row reads."""
        before = self.layers[: row.layer]
        if row.kind in (Kind.ATTEND, Kind.MERGE):
            return self.plan.target.index_of_kind(row.layer)
        if row.kind in (Kind.GATE_UP, Kind.DOWN):
            return sum(not layer.has_experts for layer in before)
        if row.kind in (Kind.ROUTER, Kind.TOP_K, Kind.EXPERT_GATE_UP, Kind.EXPERT_DOWN):
            return sum(layer.has_experts for layer in before)
        return row.layer

    def share(self, row: schedule.Row) -> tuple[int, int]:
        """First and last unit; where that is known at run time only, the share's number and how many there are."""
        units = self.units(row)
        if units is None:
            return row.share, row.shares
        return units * row.share // row.shares, units * (row.share + 1) // row.shares

    def units(self, row: schedule.Row) -> int | None:
        plan = self.plan
        if row.kind in (Kind.EMBED, Kind.REDUCE, Kind.OUTPUT, Kind.DOWN, Kind.EXPERT_DOWN):
            return plan.target.width // ROWS  # row blocks of own columns
        if row.kind in (Kind.QKV, Kind.GATE_UP, Kind.HEAD):
            return plan.matrix(row.kind).row_blocks
        if row.kind == Kind.PICK:
            return plan.matrix(Kind.HEAD).row_blocks
        if row.kind in (Kind.ATTEND, Kind.MERGE):
            is_sliding = self.layers[row.layer].is_sliding
            attention = plan.attention(is_sliding)
            if row.kind == Kind.MERGE:
                return attention.kv_heads * attention.query_rows
            return attention.kv_heads * (attention.tiles if is_sliding else plan.key_parts)
        return None

    def tap(self, row: schedule.Row) -> int:
        """Which of the auxiliary hidden states a sum is."""
        after = row.layer // 2 - 1
        is_end = row.kind == Kind.REDUCE and row.layer % 2 == 0
        return self.plan.aux_layers.index(after) if is_end and after in self.plan.aux_layers else -1


def _parity(row: schedule.Row) -> int:
    """Of the two places of parts."""
    for (name, *rest), _ in (*row.writes, *row.reads):
        if name == "part":
            return rest[1]
        if name == "stage":
            return rest[-1]
    return 0
