"""One CTA's part of a launch: what it holds, and what rows of several kinds have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pallas_kernels.decode_step.hopper import stream
from pallas_kernels.decode_step.hopper.config import CONSUMERS, ROWS, WARPS, Columns
from pallas_kernels.decode_step.hopper.machine import Buffers, Machine, Shared, Weights
from pallas_kernels.decode_step.hopper.plan import StepPlan
from pallas_kernels.decode_step.hopper.roles import Row, is_one_of
from pallas_kernels.decode_step.hopper.sync import target
from pallas_kernels.decode_step.hopper.table import Op
from pallas_kernels.decode_step.schedule import Kind

SCALED = (Op.QKV, Op.HEAD, Op.GATE_UP, Op.ROUTER)  # rows whose products are multiplied by the factors of a norm
Turns = tuple[Any, Any]  # of ring and pages: how often a place was used before


class Cta:
    """Scalars of a launch, memory, and how the four teams of consumers share a row."""

    def __init__(
        self,
        plan: StepPlan,
        machine: Machine,
        step: Any,  # int32 [4]: length, count, first and last row
        tokens: Any,
        weights: Weights,
        buffers: Buffers,
        shared: Shared,
        ring: Any,
        pages: Any,
    ) -> None:
        self.plan, self.machine, self.weights, self.buffers, self.shared = plan, machine, weights, buffers, shared
        self.ring, self.pages, self.tokens = ring, pages, tokens
        self.length, self.count, self.first, self.last = (step[i] for i in range(4))

    @property
    def page(self) -> Any:
        return self.machine.part(self.shared.area, 0, self.plan.page_area)

    @property
    def sums(self) -> Any:
        return self.machine.part(self.shared.area, self.plan.page_area, self.plan.sum_words)

    def await_row(self, counters: Any, epoch: Callable[[], Any], row: Row, **how: Any) -> None:
        """`epoch` reads the number of rounds before, whenever it is needed, so that nobody keeps it."""
        wanted = target(epoch(), row.per_round, row.value)
        scope = "sys" if self.plan.devices > 1 else "gpu"
        self.machine.when(row.wait >= 0, partial(counters.wait, row.wait, wanted, row.number, scope=scope, **how))

    def begin_row(self, team: Any, row: Row) -> None:
        """The factors of a norm whose stream a product reads; they serve until the next such row."""
        self.machine.when(is_one_of(row.kind, SCALED), lambda: self.factors(team))

    def signal_row(self, counters: Any, row: Row) -> None:
        self.machine.when(row.signal >= 0, partial(counters.signal, row.signal))

    def of_one_team(self, team: Any, run: Callable[[], None]) -> None:
        self.machine.when(team == 0, run)

    def each_item(self, team: Any, items: Any, run: Callable[[Any], None]) -> None:
        """By the teams in turn."""
        m = self.machine
        own = m.div(items - team + CONSUMERS - 1, CONSUMERS)
        m.loop(0, own, lambda number, _: run(team + number * CONSUMERS))

    def each_warp_item(self, tile: Callable, refs: tuple[Any, ...], team: Any, first: Any, items: Any) -> None:
        """A tile that does an item in each warp, for items whose first one is block `first`."""
        m = self.machine

        def four(group: Any) -> None:
            m.call(tile, refs, {"item": group * WARPS, "block": first + group * WARPS, "items": items})

        self.each_item(team, m.div(items + WARPS - 1, WARPS), four)

    def team_of(self, kind: Kind, block: Any, chunk: Any) -> Any:
        """Who multiplies a row block, or this chunk of it if teams share row blocks."""
        return self.machine.rem(block + chunk if self.plan.ways(kind) > 1 else block, CONSUMERS)

    def with_slot(self, turn: Any, team: Any, use: Callable[[Any], Any], stores: bool = False) -> Any:
        """`use(slot)`, which loads from it or also stores, once it is full; then it may be filled again."""
        self.ring.before_read(turn, team)
        found = use(self.ring.slots.at[self.ring.place(turn)])
        self.ring.freed(turn, stores)
        return found

    def by_parts(self, columns: Columns, turns: Turns, one_chunk: Callable[[Any, Any, Any], Any]) -> Turns:
        """`one_chunk(chunk, its first word in the page, ring's turn)` for all chunks, which returns the next turn."""
        m, per_part = self.machine, columns.part_chunks

        def one_part(part: Any, turns: Turns) -> Turns:
            slot_turn, page_turn = turns
            self.pages.before_read(page_turn)
            base = self.pages.place(page_turn) * self.plan.page_words

            def within(number: Any, turn: Any) -> Any:
                return one_chunk(part * per_part + number, base + number * (columns.chunk_cols // 2), turn)

            slot_turn = m.loop(0, per_part, within, slot_turn)
            self.pages.freed(page_turn)
            return slot_turn, page_turn + 1

        return m.loop(0, columns.parts, one_part, turns)

    def first_gain(self, row: Row) -> Any:
        """Which of a norm's gains are the first of the CTA's own columns; it may own none, after the last."""
        return self.machine.smaller(row.first * ROWS, self.plan.target.width - ROWS)

    def factors(self, team: Any) -> None:
        """For who reads them after the teams have met."""
        tile = stream.factors(self.plan.stream, self.plan.ctas, self.plan.target.norm_eps)
        refs = (self.buffers.squares, self.shared.factors)
        self.of_one_team(team, lambda: self.machine.call(tile, refs, {}))

    def stage(self) -> None:
        """The CTA's own sums are complete, for `send` or, on one device, for itself."""
        if self.plan.devices > 1:
            self.machine.arrive(self.shared.staged)
        else:
            self.machine.meet()
