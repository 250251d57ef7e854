"""What the warps beside the consumers do for a row: weights into the ring, inputs into pages, sums to all devices."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from pallas_kernels.decode_step.hopper import attention
from pallas_kernels.decode_step.hopper.attention import Attention
from pallas_kernels.decode_step.hopper.attention_rows import AttentionRows
from pallas_kernels.decode_step.hopper.config import CONSUMERS, LINE_WORDS, ROWS, SLOT_COPIES, Inputs, padded
from pallas_kernels.decode_step.hopper.expert_rows import ExpertRows
from pallas_kernels.decode_step.hopper.plan import PAGE_PARTS
from pallas_kernels.decode_step.hopper.roles import Row
from pallas_kernels.decode_step.hopper.table import Op
from pallas_kernels.decode_step.schedule import Kind

Handlers = dict[tuple[int, ...], Callable[[Row, Any], Any]]  # by the kinds that share them
STREAM_READERS = (Op.QKV, Op.HEAD, Op.GATE_UP, Op.ROUTER, Op.EXPERT_GATE_UP)


class Copies(ExpertRows, AttentionRows):
    """Handlers: (row, turn of what is filled) -> its next turn."""

    def load(self) -> Handlers:
        """Handlers of the warp that fills the ring."""
        plan = self.plan
        found: Handlers = {(Op.REDUCE,): self.prefetch_gains}
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

    def fill(self, turn: Any, team: Any, *sources: Any) -> None:
        """One or two copies, of pieces that lie side by side in the slot."""
        m = self.machine

        def copy(slot: Any, barrier: Any) -> None:
            for number, source in enumerate(sources):
                words = source.shape[0]
                m.copy(source, m.part(slot, number * self.plan.down.unit_words, words), barrier)
            for _ in range(len(sources), SLOT_COPIES):
                m.arrive_alone(barrier)

        self.ring.fill(turn, team, copy)

    def prefetch_gains(self, row: Row, turn: Any) -> Any:
        blocks = self.plan.target.width // ROWS
        first, every = row.layer * blocks + row.first, blocks // self.plan.ctas  # that every CTA has
        self.prefetch_floats(self.weights.gains, first, ROWS, every)
        return turn

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

    def load_matrix(self, kind: Kind, row: Row, turn: Any) -> Any:
        m, matrix = self.machine, self.plan.matrix(kind)
        layer = 0 if kind == Kind.HEAD else row.layer
        items, words = row.last - row.first, self.weights.matrices[kind]
        if kind != Kind.HEAD:  # which is larger than the cache
            # What the ring has no room for is under way while memory would have nothing to do.
            m.prefetch(words.at[layer, row.first], items)

        def one(number: Any, turn: Any) -> Any:
            chunk, block = m.div(number, items), row.first + m.rem(number, items)
            team = m.rem(block + chunk, CONSUMERS)
            self.fill(turn, team, words.at[layer, block, chunk])
            return turn + 1

        return m.loop(0, items * matrix.columns.chunks, one, turn)

    def load_router(self, row: Row, turn: Any) -> Any:
        m, router = self.machine, self.plan.router
        m.prefetch(self.weights.router.at[row.layer, m.cta])
        self.prefetch_floats(self.weights.router_bias, row.layer, self.plan.target.experts, 1)

        def one(chunk: Any, turn: Any) -> Any:
            source = self.weights.router.at[row.layer, m.cta, chunk]
            self.fill(turn, m.rem(chunk, CONSUMERS), source)
            return turn + 1

        return m.loop(0, router.columns.chunks, one, turn)

    def load_experts(self, row: Row, turn: Any) -> Any:
        m, matrix = self.machine, self.plan.matrix(Kind.EXPERT_GATE_UP)
        m.wait(self.shared.listed)
        first, last, blocks = self.expert_blocks(row)
        items, stack = last - first, self.weights.matrices[Kind.EXPERT_GATE_UP]

        def one(number: Any, turn: Any) -> Any:
            chunk, item = m.div(number, items), m.rem(number, items)
            expert = row.layer * self.plan.target.experts + self.shared.active[m.div(first + item, blocks)]
            source = stack.at[expert, m.rem(first + item, blocks), chunk]
            self.fill(turn, m.rem(item, CONSUMERS), source)
            return turn + 1

        return m.loop(0, items * matrix.columns.chunks, one, turn)

    def load_down(self, row: Row, turn: Any) -> Any:
        """Of each active expert the row blocks of the CTA's own columns, side by side; one in vain, if it owns none."""
        m, plan = self.machine, self.plan
        least = plan.target.width // ROWS // plan.ctas

        def one(number: Any, turn: Any) -> Any:
            for tiles in sorted({least, plan.down.tiles}):
                m.when(row.last - row.first == tiles, partial(self.fill_down, row, turn, number, tiles))
            return turn + 1

        return m.loop(0, self.down_slots(), one, turn)

    def fill_down(self, row: Row, turn: Any, number: Any, tiles: int) -> None:
        m, down = self.machine, self.plan.down
        first, words = (row.first if tiles else 0) * down.tile_words, max(tiles, 1) * down.tile_words

        def piece(unit: Any) -> Any:
            unit = m.smaller(unit, self.shared.count[0] - 1)  # of an odd number the last one twice
            expert = row.layer * self.plan.target.experts + self.shared.active[unit]
            return m.part(self.weights.expert_down.at[expert], first, words)

        pieces = [piece(number * down.units + unit) for unit in range(down.units)]
        self.fill(turn, m.rem(number, CONSUMERS), *pieces)

    def load_block(self, config: Attention, row: Row, head: Any, block: Any, turn: Any, team: Any) -> None:
        cache = self.buffers.caches[config.window is not None]
        blocks = config.cache_rows // attention.KEYS
        number = (row.layer * config.kv_heads + head) * blocks + attention.place_of(config, block)
        self.fill(turn, team, cache.at[number])

    def load_window(self, row: Row, turn: Any) -> Any:
        m, config = self.machine, self.plan.attention(True)
        self.prefetch_angles(True)
        lowest, blocks = attention.blocks_of(config, self.length, self.count, 0, 1)

        def one_unit(unit: Any, turn: Any) -> Any:
            def one(number: Any, turn: Any) -> Any:
                block = lowest + number
                self.load_block(config, row, m.div(unit, config.tiles), block, turn, m.rem(block, CONSUMERS))
                return turn + 1

            return m.loop(0, blocks, one, turn)

        return m.loop(row.first, row.last, one_unit, turn)

    def load_keys(self, row: Row, turn: Any) -> Any:
        """A block for each warpgroup that its queries keep busy: the second copy comes from the L2 cache."""
        m, plan, config = self.machine, self.plan, self.plan.attention(False)
        groups, at_once = plan.query_groups, plan.blocks_at_once
        parts = plan.key_parts * at_once
        self.prefetch_angles(False)

        def one_unit(unit: Any, turn: Any) -> Any:
            head, part = m.div(unit, plan.key_parts), m.rem(unit, plan.key_parts) * at_once

            def one(number: Any, turn: Any) -> Any:
                round_, team = m.div(number, CONSUMERS), m.rem(number, CONSUMERS)
                block = part + m.div(team, groups) + round_ * parts
                self.load_block(config, row, head, block, turn, team)
                return turn + 1

            return m.loop(0, self.blocks_of_part(config, part, parts) * groups, one, turn)

        return m.loop(row.first, row.last, one_unit, turn)

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

    def await_fetch(self, counters: Any, row: Row) -> None:
        ops = (*STREAM_READERS, Op.OUTPUT, Op.DOWN, Op.EXPERT_DOWN)
        is_fetched = functools.reduce(operator.or_, [row.kind == op for op in ops])
        self.machine.when(is_fetched, lambda: self.await_row(counters, row, reads="copies"))

    def fetch_parts(self, inputs: Inputs, source: Any, row: Row, turn: Any) -> Any:
        """Of the tokens that there can be."""
        words = padded(self.plan.tokens * inputs.token_words, LINE_WORDS)

        def one(part: Any, turn: Any) -> Any:
            at = self.pages.place(turn) * self.plan.page_words
            self.fetch_page(turn, at, source, part * inputs.part_words, words)
            return turn + 1

        return self.machine.loop(0, inputs.columns.parts, one, turn)

    def fetch_hidden(self, row: Row, turn: Any) -> Any:
        """All pairs' rows, across both places of the page, wherever they begin."""
        words = self.plan.hidden_rows * self.plan.hidden_stride // PAGE_PARTS

        def one(part: Any, turn: Any) -> Any:
            self.fetch_page(turn, part * words, self.buffers.hidden, part * words, words)
            return turn + 1

        return self.machine.loop(0, PAGE_PARTS, one, turn)

    def fetch_page(self, turn: Any, at: Any, source: Any, first: Any, words: int) -> None:
        m = self.machine
        self.pages.before_fill(turn)
        place = m.part(self.shared.page, at, words)
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
