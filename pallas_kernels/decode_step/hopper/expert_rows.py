"""Rows of the experts: which of them, and their products."""

from __future__ import annotations

from typing import Any

from pallas_kernels.decode_step.hopper import products, routing
from pallas_kernels.decode_step.hopper.config import CONSUMERS, ROWS
from pallas_kernels.decode_step.hopper.cta import Turns
from pallas_kernels.decode_step.hopper.dense_rows import DenseRows
from pallas_kernels.decode_step.hopper.plan import PAGE_PARTS
from pallas_kernels.decode_step.hopper.roles import Row
from pallas_kernels.decode_step.schedule import Kind


class ExpertRows(DenseRows):
    """Handlers: (team, row, turns) -> turns."""

    def router(self, team: Any, row: Row, turns: Turns) -> Turns:
        m, plan, router = self.machine, self.plan, self.plan.router
        tile, score = routing.multiply_router(router, plan.columns), routing.score(router, plan.columns)

        def one_chunk(chunk: Any, first: Any, turn: Any) -> Any:
            def run(slot: Any) -> None:
                scalars = {"team": team, "first": first, "is_first": m.integer(chunk < CONSUMERS)}
                m.call(tile, (slot, self.page, self.sums), scalars)

            m.when(m.rem(chunk, CONSUMERS) == team, lambda: self.with_slot(turn, team, run))
            return turn + 1

        turns = self.by_parts(router.columns, turns, one_chunk)
        m.meet()
        refs = (self.sums, self.shared.factors, self.buffers.scores)
        self.of_one_team(team, lambda: m.call(score, refs, {"cta": m.cta}))
        return turns

    def top_k(self, team: Any, row: Row, turns: Turns) -> Turns:
        m, t, shared, columns = self.machine, self.plan.target, self.shared, self.plan.columns
        choose = routing.top_k(t.experts, t.chosen, columns)
        refs = (self.buffers.scores, self.weights.router_bias, shared.ids, shared.routes)
        m.call(choose, refs, {"team": team, "count": self.count, "bias_first": row.layer * t.experts})
        m.meet()

        def make_list() -> None:
            tile = routing.list_experts(t.experts, t.chosen, columns)
            m.call(tile, (shared.ids, shared.lists, shared.active, shared.count, shared.pairs), {})
            m.arrive(shared.listed)

        def count() -> None:
            tile = routing.count_experts(t.experts, t.chosen, columns)
            refs = (shared.active, shared.count, shared.pairs, self.buffers.expert_counts)
            m.call(tile, refs, {"counts_first": row.layer * t.experts})

        self.of_one_team(team, make_list)
        m.meet()
        m.when((team == 1) & (m.cta == 0), count)
        return turns

    def expert_blocks(self, row: Row) -> tuple[Any, Any, int]:
        """This CTA's share of all active experts' row blocks of gate and up, and how many an expert has."""
        blocks = self.plan.matrix(Kind.EXPERT_GATE_UP).row_blocks
        total = self.shared.count[0] * blocks
        first, last = (self.machine.div(total * (row.first + i), row.last) for i in range(2))
        return first, last, blocks

    def expert_gate_up(self, team: Any, row: Row, turns: Turns) -> Turns:
        """With the factors that the router's row has left: the stream is the same."""
        plan, matrix = self.plan, self.plan.matrix(Kind.EXPERT_GATE_UP)
        first, last, blocks = self.expert_blocks(row)
        turns = self.multiply_items(Kind.EXPERT_GATE_UP, team, 0, last - first, turns)
        tile = products.store_activated(
            plan.hidden_place, plan.columns, plan.ways(Kind.EXPERT_GATE_UP), matrix.format, blocks
        )
        refs = (self.sums, self.buffers.hidden, self.shared.factors, self.shared.pairs)
        self.each_warp_item(tile, refs, team, first, last - first)
        return turns

    def expert_down(self, team: Any, row: Row, turns: Turns) -> Turns:
        """The products of all pairs for the CTA's own columns, each expert's by one team; then each token's sum."""
        m, plan, shared = self.machine, self.plan, self.shared
        slot_turn, page_turn = turns
        tile = products.multiply_expert_down(plan.down, plan.target.chosen, plan.columns)
        for part in range(PAGE_PARTS):
            self.pages.before_read(page_turn + part)
        tiles, slots = row.last - row.first, self.down_slots()

        def one(number: Any) -> None:
            refs = (self.page, self.sums, shared.pairs)
            scalars = {
                "number": number,
                "units": shared.count[0],
                "before": row.first - self.first_tile(row),
                "tiles": tiles,
            }
            self.with_slot(slot_turn + number, team, lambda slot: m.call(tile, (slot, *refs), scalars))

        self.each_item(team, slots, one)
        for part in range(PAGE_PARTS):
            self.pages.freed(page_turn + part)
        m.meet()
        combine = products.combine(plan.target.chosen, plan.columns, plan.down.splits)
        m.call(combine, (shared.routes, self.sums, shared.own), {"tiles": tiles, "team": team})
        self.stage()
        return slot_turn + slots, page_turn + PAGE_PARTS

    def first_tile(self, row: Row) -> Any:
        """Of as many as any CTA owns: this one may own fewer, after some of another one's."""
        return self.machine.smaller(row.first, self.plan.target.width // ROWS - self.plan.down.tiles)

    def down_slots(self) -> Any:
        """That the active experts' row blocks take."""
        units = self.plan.down.units
        return self.machine.div(self.shared.count[0] + units - 1, units)
