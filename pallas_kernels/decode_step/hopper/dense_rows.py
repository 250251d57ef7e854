"""Rows of the residual stream and of dense products."""

from __future__ import annotations

from typing import Any

from pallas_kernels.decode_step.hopper import picking, products, stream
from pallas_kernels.decode_step.hopper.config import CONSUMERS, OWN_COLUMNS, ROWS, Matrix
from pallas_kernels.decode_step.hopper.cta import Cta, Turns
from pallas_kernels.decode_step.hopper.roles import Row
from pallas_kernels.decode_step.hopper.table import EPOCH, Op
from pallas_kernels.decode_step.schedule import Kind


class DenseRows(Cta):
    """Handlers: (team, row, turns) -> turns."""

    def own_columns(self, row: Row) -> dict[str, Any]:
        return {"first": row.first * ROWS, "size": (row.last - row.first) * ROWS, "cta": self.machine.cta}

    def stream_scalars(self, row: Row) -> dict[str, Any]:
        scalars = {"count": self.count, "gain_first": 0 - self.first_gain(row), "reader": row.reader}
        return self.own_columns(row) | scalars

    def columns_of_cta(self) -> dict[str, Any]:
        """The same where no row tells them, as the table shares them out."""
        m, blocks = self.machine, self.plan.target.width // ROWS
        first, last = (m.div(blocks * (m.cta + i), self.plan.ctas) * ROWS for i in range(2))
        return {"first": first, "size": last - first}

    def resume(self, team: Any) -> None:
        """What an earlier launch has left of the stream."""
        tile, scalars = stream.resume(self.plan.stream), self.columns_of_cta()
        self.of_one_team(team, lambda: self.machine.call(tile, (self.buffers.x, self.shared.x), scalars))

    def embed(self, team: Any, row: Row, turns: Turns) -> Turns:
        tile = stream.embed(self.plan.stream, self.plan.vocab_rows)
        return self.begin_stream(tile, (self.tokens, self.weights.embed), (), team, self.stream_scalars(row), turns)

    def begin_stream(
        self,
        tile: Any,
        sources: tuple[Any, ...],
        taps: tuple[Any, ...],
        team: Any,
        scalars: dict[str, Any],
        turns: Turns,
    ) -> Turns:
        """A tile of one team, which needs the gains that `load_gains` has put into a slot."""
        b, (slot_turn, page_turn) = self.buffers, turns
        made = (self.shared.x, b.x, b.stream, b.squares, *taps)
        use = lambda slot: self.machine.call(tile, (*sources, slot, *made), scalars)  # noqa: E731
        self.of_one_team(team, lambda: self.with_slot(slot_turn, 0, use))
        return slot_turn + 1, page_turn

    def reduce(self, team: Any, row: Row, turns: Turns) -> Turns:
        b, taps = self.buffers, len(self.plan.aux_layers)
        tile = stream.reduce(self.plan.stream, self.plan.devices, taps)
        parts = self.shared.own
        if self.plan.devices > 1:
            parts = self.machine.part(b.parts, self.first_part(row), self.plan.devices * self.plan.own_words)
        scalars = self.stream_scalars(row) | ({"tap": row.tap} if taps else {})
        return self.begin_stream(tile, (parts,), (b.aux,) if taps else (), team, scalars, turns)

    def first_part(self, row: Row) -> Any:
        """Where the devices' sums for this CTA's columns lie, one device after the other."""
        return (row.parity * self.plan.ctas + self.machine.cta) * (self.plan.devices * self.plan.own_words)

    def multiply(self, kind: Kind, team: Any, row: Row, turns: Turns) -> Turns:
        return self.multiply_items(kind, team, row.first, row.last - row.first, turns)

    def multiply_items(self, kind: Kind, team: Any, block: Any, items: Any, turns: Turns) -> Turns:
        """Row blocks from `block` on, by the teams that `team_of` tells; all teams have met when it returns."""
        m, matrix, ways = self.machine, self.plan.matrix(kind), self.plan.ways(kind)

        def one_chunk(chunk: Any, first: Any, turn: Any) -> Any:
            own = m.rem(team + CONSUMERS - self.team_of(kind, block, chunk), CONSUMERS)
            way, is_first = m.rem(chunk, ways), m.integer(chunk < ways)

            def one_item(number: Any, _: None) -> None:
                item = own + number * CONSUMERS
                scalars = {"part": item * ways + way, "first": first, "is_first": is_first}
                self.with_slot(turn + item, team, lambda slot: self.multiply_slot(matrix, slot, scalars))

            m.loop(0, m.div(items - own + CONSUMERS - 1, CONSUMERS), one_item)
            return turn + items

        turns = self.by_parts(matrix.columns, turns, one_chunk)
        m.meet()
        return turns

    def multiply_slot(self, matrix: Matrix, slot: Any, scalars: dict[str, Any]) -> None:
        tile = products.multiply_chunk(matrix, self.plan.columns)
        self.machine.call(tile, (slot, self.page, self.sums), scalars)

    def widen(self, team: Any, row: Row, turns: Turns) -> Turns:
        """QKV, and gate and up of dense layers: the same product of the stream up to their ends."""
        turns = self.multiply(Kind.QKV, team, row, turns)
        self.machine.when(row.kind == Op.QKV, lambda: self.store_rows(Kind.QKV, self.buffers.qkv, team, row))
        if Kind.GATE_UP in self.plan.products:
            self.machine.when(row.kind == Op.GATE_UP, lambda: self.store_activated(team, row))
        return turns

    def store_rows(self, kind: Kind, out: Any, team: Any, row: Row) -> None:
        tile = products.store_rows(self.plan.matrix(kind).rows, self.plan.columns, self.plan.ways(kind), True)
        refs = (self.sums, out, self.shared.factors)

        def store(item: Any) -> None:
            self.machine.call(tile, refs, {"item": item, "block": row.first + item})

        self.each_item(team, row.last - row.first, store)

    def store_activated(self, team: Any, row: Row) -> None:
        plan = self.plan
        place, ways = plan.inputs(Kind.DOWN).place, plan.ways(Kind.GATE_UP)
        tile = products.store_activated(place, plan.columns, ways, plan.reads(Kind.DOWN))
        refs = (self.sums, self.buffers.hidden, self.shared.factors)
        self.each_warp_item(tile, refs, team, row.first, row.last - row.first)

    def head(self, team: Any, row: Row, turns: Turns) -> Turns:
        """Also what the head reads, normalised, for whoever wants hidden states."""
        m, b, width = self.machine, self.buffers, self.plan.target.width
        turns = self.multiply(Kind.HEAD, team, row, turns)
        self.store_rows(Kind.HEAD, b.logits, team, row)
        scalars = self.columns_of_cta() | {"gain_first": 2 * len(self.plan.target.layers) * width}
        refs = (b.x, self.shared.factors, self.weights.gains, b.last)
        tile = stream.finish(self.plan.stream)
        self.of_one_team(team, lambda: m.call(tile, refs, scalars))
        return turns

    def own_sums(self, kind: Kind, team: Any, row: Row, turns: Turns) -> Turns:
        """A dense product whose rows are the CTA's own columns: not more row blocks than there are teams."""
        turns = self.multiply(kind, team, row, turns)
        tile = products.store_own(OWN_COLUMNS, self.plan.columns, self.plan.ways(kind))
        store = lambda: self.machine.call(tile, (self.sums, self.shared.own), {"item": team})  # noqa: E731
        self.machine.when(team < row.last - row.first, store)
        self.stage()
        return turns

    def output(self, team: Any, row: Row, turns: Turns) -> Turns:
        return self.own_sums(Kind.OUTPUT, team, row, turns)

    def down(self, team: Any, row: Row, turns: Turns) -> Turns:
        return self.own_sums(Kind.DOWN, team, row, turns)

    def pick(self, team: Any, row: Row, turns: Turns) -> Turns:
        m, b, plan = self.machine, self.buffers, self.plan
        vocab = plan.target.vocab
        tile = picking.pick_part(vocab, plan.columns)
        first, last = (m.smaller(block * ROWS, vocab) for block in (row.first, row.last))
        scalars = {"cta": m.cta, "first": first, "last": last}
        self.of_one_team(team, lambda: m.call(tile, (b.logits, b.candidates), scalars))
        return turns

    def pick_best(self, team: Any, row: Row, turns: Turns) -> Turns:
        """The last row of a round, which all CTAs have begun by now: the next one has another number."""
        m, b = self.machine, self.buffers
        tile = picking.pick_all(self.plan.ctas, self.plan.columns)
        self.of_one_team(team, lambda: m.call(tile, (b.candidates, b.best, b.best_logits), {}))
        self.of_one_team(team, lambda: m.count_round(b.counts, EPOCH))
        return turns
