"""What the warps beside the consumers do for a row: weights into the ring, inputs into pages, sums to all devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from pallas_kernels.decode_step.hopper import attention
from pallas_kernels.decode_step.hopper.attention import Attention
from pallas_kernels.decode_step.hopper.attention_rows import AttentionRows
from pallas_kernels.decode_step.hopper.config import CONSUMERS, GAINS, LINE_WORDS, SLOT_COPIES, Inputs, padded
from pallas_kernels.decode_step.hopper.cta import SCALED
from pallas_kernels.decode_step.hopper.expert_rows import ExpertRows
from pallas_kernels.decode_step.hopper.plan import PAGE_PARTS
from pallas_kernels.decode_step.hopper.roles import Row, is_one_of
from pallas_kernels.decode_step.hopper.table import Op
from pallas_kernels.decode_step.schedule import Kind

Handlers = dict[tuple[int, ...], Callable[[Row, Any], Any]]  # by the kinds that share them
STREAM_READERS = (*SCALED, Op.EXPERT_GATE_UP)
# Fills under way at a time. More would keep memory no busier, but all else waits behind them: signals most of all.
AHEAD = 4


class Filled(NamedTuple):
    """Of the ring: how many fills have begun, and the teams of the last ones, as digits, the oldest first."""

    turn: Any
    teams: Any


class Copies(ExpertRows, AttentionRows):
    """Handlers: (row, what is filled) -> the same after it; of pages, only the turn."""

    def load(self) -> Handlers:
        """Handlers of the warp that fills the ring."""
        plan = self.plan
        found: Handlers = {(Op.EMBED, Op.REDUCE): self.load_gains}
        for kind in plan.products:
            if kind != Kind.EXPERT_GATE_UP:
                found[Op(kind),] = partial(self.load_matrix, kind)
        if False in plan.kinds:
            found[Op.ATTEND,] = self.load_keys
        if True in plan.kinds:
            found[Op.ATTEND_WINDOW,] = self.load_window
        if Kind.EXPERT_GATE_UP in plan.products:
            found |= {(Op.ROUTER,): self.load_router, (Op.EXPERT_DOWN,): self.load_down}
            found[Op.EXPERT_GATE_UP,] = self.load_experts
        return found

    def fill(self, filled: Filled, team: Any, *sources: Any) -> Filled:
        """One or two copies, of pieces that lie side by side in the slot, when the fill AHEAD before has landed."""
        m, digits = self.machine, CONSUMERS ** (AHEAD - 1)

        def copy(slot: Any, barrier: Any) -> None:
            for number, source in enumerate(sources):
                words = source.shape[0]
                m.copy(source, m.part(slot, number * self.plan.down.unit_words, words), barrier)
            for _ in range(len(sources), SLOT_COPIES):
                m.arrive_alone(barrier)

        before = m.div(filled.teams, digits)
        m.when(filled.turn >= AHEAD, lambda: self.ring.before_read(filled.turn - AHEAD, before))
        self.ring.fill(filled.turn, team, copy)
        return Filled(filled.turn + 1, m.rem(filled.teams, digits) * CONSUMERS + team)

    def load_gains(self, row: Row, filled: Filled) -> Filled:
        """Of the CTA's own columns, and of what follows."""
        first = row.layer * self.plan.target.width + self.first_gain(row)
        return self.fill(filled, 0, self.machine.part(self.weights.gains, first, GAINS))

    def prefetch_floats(self, source: Any, first: Any, size: int, count: int) -> None:
        """Rows of so many floats; what may not begin at 16 bytes is left out, for all that it changes is time."""
        m = self.machine
        if count and size % 4 == 0:
            m.prefetch(m.part(source, first * size, count * size))

    def prefetch_angles(self, is_sliding: bool) -> None:
        """Of the new tokens' positions."""
        m, half = self.machine, self.plan.target.rotary // 2
        positions, count = self.plan.capacity, self.plan.tokens
        first = m.smaller(self.length, positions - count)
        for start in (0, positions):
            self.prefetch_floats(self.weights.rotary[is_sliding], start + first, half, count)

    def load_matrix(self, kind: Kind, row: Row, filled: Filled) -> Filled:
        layer = 0 if kind == Kind.HEAD else row.layer
        source = lambda block, chunk: self.weights.matrices[kind].at[layer, block, chunk]  # noqa: E731
        return self.load_items(kind, row.first, row.last - row.first, source, filled)

    def load_items(
        self, kind: Kind, first: Any, items: Any, source: Callable[[Any, Any], Any], filled: Filled
    ) -> Filled:
        """Row blocks from `first` on, as `multiply_items` takes them: of a chunk all, then of the next one."""
        m = self.machine

        def one(number: Any, filled: Filled) -> Filled:
            chunk, block = m.div(number, items), first + m.rem(number, items)
            return self.fill(filled, self.team_of(kind, block, chunk), source(block, chunk))

        return m.loop(0, items * self.plan.matrix(kind).columns.chunks, one, filled)

    def load_router(self, row: Row, filled: Filled) -> Filled:
        m, router = self.machine, self.plan.router
        self.prefetch_floats(self.weights.router_bias, row.layer, self.plan.target.experts, 1)

        def one(chunk: Any, filled: Filled) -> Filled:
            source = self.weights.router.at[row.layer, m.cta, chunk]
            return self.fill(filled, m.rem(chunk, CONSUMERS), source)

        return m.loop(0, router.columns.chunks, one, filled)

    def load_experts(self, row: Row, filled: Filled) -> Filled:
        m = self.machine
        m.wait(self.shared.listed)
        first, last, blocks = self.expert_blocks(row)

        def source(item: Any, chunk: Any) -> Any:
            expert = row.layer * self.plan.target.experts + self.shared.active[m.div(first + item, blocks)]
            return self.weights.matrices[Kind.EXPERT_GATE_UP].at[expert, m.rem(first + item, blocks), chunk]

        return self.load_items(Kind.EXPERT_GATE_UP, 0, last - first, source, filled)

    def load_down(self, row: Row, filled: Filled) -> Filled:
        """Of each active expert the row blocks of the CTA's own columns, side by side."""
        m, down = self.machine, self.plan.down
        first, words = self.first_tile(row) * down.tile_words, down.tiles * down.tile_words

        def piece(unit: Any) -> Any:
            unit = m.smaller(unit, self.shared.count[0] - 1)  # of an odd number the last one twice
            expert = row.layer * self.plan.target.experts + self.shared.active[unit]
            return m.part(self.weights.expert_down.at[expert], first, words)

        def one(number: Any, filled: Filled) -> Filled:
            pieces = [piece(number * down.units + unit) for unit in range(down.units)]
            return self.fill(filled, m.rem(number, CONSUMERS), *pieces)

        return m.loop(0, self.down_slots(), one, filled)

    def load_block(self, config: Attention, row: Row, head: Any, block: Any, filled: Filled, team: Any) -> Filled:
        cache = self.buffers.caches[config.window is not None]
        blocks = config.cache_rows // attention.KEYS
        number = (row.layer * config.kv_heads + head) * blocks + attention.place_of(config, block)
        return self.fill(filled, team, cache.at[number])

    def load_window(self, row: Row, filled: Filled) -> Filled:
        m, config, heads = self.machine, self.plan.attention(True), self.plan.target.heads
        self.prefetch_angles(True)
        if config.has_sink:
            self.prefetch_floats(self.weights.sinks[True], row.layer, heads, 1)
        lowest, blocks = attention.blocks_of(config, self.length, self.count, 0, 1)

        def one_unit(unit: Any, filled: Filled) -> Filled:
            def one(number: Any, filled: Filled) -> Filled:
                block = lowest + number
                return self.load_block(config, row, m.div(unit, config.tiles), block, filled, m.rem(block, CONSUMERS))

            return m.loop(0, blocks, one, filled)

        return m.loop(row.first, row.last, one_unit, filled)

    def load_keys(self, row: Row, filled: Filled) -> Filled:
        """A block for each warpgroup that its queries keep busy: the second copy comes from the L2 cache."""
        m, plan, config = self.machine, self.plan, self.plan.attention(False)
        groups, at_once = plan.query_groups, plan.blocks_at_once
        parts = plan.key_parts * at_once
        self.prefetch_angles(False)

        def one_unit(unit: Any, filled: Filled) -> Filled:
            head, part = m.div(unit, plan.key_parts), m.rem(unit, plan.key_parts) * at_once

            def one(number: Any, filled: Filled) -> Filled:
                round_, team = m.div(number, CONSUMERS), m.rem(number, CONSUMERS)
                block = part + m.div(team, groups) + round_ * parts
                return self.load_block(config, row, head, block, filled, team)

            return m.loop(0, self.blocks_of_part(config, part, parts) * groups, one, filled)

        return m.loop(row.first, row.last, one_unit, filled)

    def fetch(self) -> Handlers:
        """Handlers of the warp that brings inputs into pages, each of which begins with `await_fetch`."""
        plan, b = self.plan, self.buffers
        found: Handlers = {STREAM_READERS: partial(self.fetch_parts, plan.inputs(Kind.QKV), b.stream)}
        found[Op.OUTPUT,] = partial(self.fetch_parts, plan.inputs(Kind.OUTPUT), b.attended)
        if Kind.DOWN in plan.products:
            found[Op.DOWN,] = partial(self.fetch_parts, plan.inputs(Kind.DOWN), b.hidden)
        if Kind.EXPERT_GATE_UP in plan.products:
            found[Op.EXPERT_DOWN,] = self.fetch_hidden
        return found

    def await_fetch(self, counters: Any, epoch: Callable[[], Any], row: Row) -> None:
        ops = (*STREAM_READERS, Op.OUTPUT, Op.DOWN, Op.EXPERT_DOWN)
        self.machine.when(is_one_of(row.kind, ops), lambda: self.await_row(counters, epoch, row, reads="copies"))

    def fetch_parts(self, inputs: Inputs, source: Any, row: Row, turn: Any) -> Any:
        """Of the tokens that there can be."""
        words = padded(self.plan.tokens * inputs.token_words, LINE_WORDS)

        def one(part: Any, turn: Any) -> Any:
            at = self.pages.place(turn) * self.plan.page_words
            self.fetch_page(turn, at, source, part * inputs.part_words, words)
            return turn + 1

        return self.machine.loop(0, inputs.columns.parts, one, turn)

    def fetch_hidden(self, row: Row, turn: Any) -> Any:
        """All pairs' rows, across all places of pages, whichever is the first."""
        words = self.plan.hidden_part

        def one(part: Any, turn: Any) -> Any:
            self.fetch_page(turn, part * words, self.buffers.hidden, part * words, words)
            return turn + 1

        return self.machine.loop(0, PAGE_PARTS, one, turn)

    def fetch_page(self, turn: Any, at: Any, source: Any, first: Any, words: int) -> None:
        m = self.machine
        self.pages.before_fill(turn)
        place = m.part(self.page, at, words)
        m.copy(m.part(source, first, words), place, self.pages.full.at[self.pages.place(turn)])

    def send(self, counters: Any) -> Handlers:
        """Handlers of the warp that sends own columns to all devices."""
        if self.plan.devices == 1:
            return {}
        return {(Op.OUTPUT, Op.DOWN, Op.EXPERT_DOWN): partial(self.send_own, counters)}

    def send_own(self, counters: Any, row: Row, carry: Any) -> Any:
        m, plan = self.machine, self.plan
        m.wait(self.shared.staged)
        first = self.first_part(row) + m.rank * plan.own_words
        m.push(self.shared.own, self.buffers.parts, first, plan.own_words)
        counters.signal(row.arrived, peers=m.peers, wrote="copies")
        return carry
