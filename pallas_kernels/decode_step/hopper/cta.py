"""One CTA's part of a launch: what it holds, and what rows of several kinds have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pallas_kernels.decode_step.hopper import stream
from pallas_kernels.decode_step.hopper.config import CONSUMERS, Columns
from pallas_kernels.decode_step.hopper.machine import Buffers, Machine, Shared, Weights
from pallas_kernels.decode_step.hopper.plan import StepPlan
from pallas_kernels.decode_step.hopper.roles import Row
from pallas_kernels.decode_step.hopper.sync import target
from pallas_kernels.decode_step.hopper.table import EPOCH

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
    def epoch(self) -> Any:
        """Read whenever it is needed, so that nobody keeps it; it changes when all CTAs have seen it (`pick_best`)."""
        return self.buffers.counts[EPOCH]

    def await_row(self, counters: Any, row: Row, **how: Any) -> None:
        wanted = target(self.epoch, row.per_round, row.value)
        scope = "sys" if self.plan.devices > 1 else "gpu"
        self.machine.when(row.wait >= 0, partial(counters.wait, row.wait, wanted, row.number, scope=scope, **how))

    def signal_row(self, counters: Any, row: Row) -> None:
        self.machine.when(row.signal >= 0, partial(counters.signal, row.signal))

    def of_one_team(self, team: Any, run: Callable[[], None]) -> None:
        self.machine.when(team == 0, run)

    def each_item(self, team: Any, items: Any, run: Callable[[Any], None]) -> None:
        """By the teams in turn."""
        m = self.machine
        own = m.div(items - team + CONSUMERS - 1, CONSUMERS)
        m.loop(0, own, lambda number, _: run(team + number * CONSUMERS))

    def with_slot(self, turn: Any, team: Any, use: Callable[[Any], Any]) -> Any:
        """`use(slot)` once it is full; then it may be filled again."""
        self.ring.before_read(turn, team)
        found = use(self.ring.slots.at[self.ring.place(turn)])
        self.ring.freed(turn)
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

    def scratch(self, team: Any) -> Any:
        return self.machine.part(self.shared.scratch, team * self.plan.scratch_words, self.plan.scratch_words)

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
