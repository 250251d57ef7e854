"""Rows of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.decode_step.hopper import attention, attention_inputs
from pallas_kernels.decode_step.hopper.attention import Attention
from pallas_kernels.decode_step.hopper.config import CONSUMERS, ROWS, WARPS
from pallas_kernels.decode_step.hopper.cta import Cta, Turns
from pallas_kernels.decode_step.hopper.roles import Row


class AttentionRows(Cta):
    """Handlers: (team, row, turns) -> turns."""

    def attention_refs(self, is_sliding: bool) -> tuple[Any, ...]:
        """Queries, new keys, new values, and on sliding layers the teams' parts: all where pages and sums are else."""
        sizes, first, found = self.plan.attention_parts(is_sliding), 0, []
        for size in sizes:
            found.append(self.machine.part(self.shared.area, first, size) if size else None)
            first += size
        return tuple(found)

    def prepare(
        self, config: Attention, team: Any, row: Row, head: Any, first_tile: Any, tiles: int, writes: Any
    ) -> None:
        """Queries and new keys and values into shared memory; and those into the cache, if that is this CTA's task."""
        m, is_sliding = self.machine, config.window is not None
        queries, keys, values, _ = self.attention_refs(is_sliding)
        rotary, cache = (of_kinds[is_sliding] for of_kinds in (self.weights.rotary, self.buffers.caches))
        scalars = {"team": team, "head": head, "first_tile": first_tile, "tiles": tiles, "length": self.length}
        m.call(attention_inputs.prepare(config), (self.buffers.qkv, rotary, queries, keys, values), scalars)
        m.meet()
        scalars = {"team": team, "layer": row.layer, "head": head, "length": self.length, "count": self.count}
        m.when(writes, lambda: m.call(attention_inputs.write_cache(config), (keys, values, cache), scalars))

    def attend_blocks(
        self,
        config: Attention,
        team: Any,
        turn_of: Callable[[Any], Any],
        blocks: tuple[Any, Any, Any],
        scalars: dict[str, Any],
    ) -> Any:
        """The state after some blocks of keys: the first, the distance from one to the next, and how many."""
        m, (first, step, count) = self.machine, blocks
        queries, keys, values, _ = self.attention_refs(config.window is not None)
        tile = attention.attend_block(config)

        def one(number: Any, state: Any) -> Any:
            found = scalars | {"block": first + number * step, "length": self.length, "count": self.count}
            use = lambda slot: m.call(tile, (queries, keys, values, slot), found, state)  # noqa: E731
            return self.with_slot(turn_of(number), team, use, stores=True)

        return m.loop(0, count, one, m.first_state(config.first_state()))

    def attend_window(self, team: Any, row: Row, turns: Turns) -> Turns:
        """Tiles of queries, one after the other; the teams take blocks of keys in turn, and are merged here."""
        m, config = self.machine, self.plan.attention(True)
        first, own = attention.blocks_of(config, self.length, self.count, team, CONSUMERS)
        lowest, blocks = attention.blocks_of(config, self.length, self.count, 0, 1)
        parts = self.attention_refs(True)[3]

        def one(unit: Any, turns: Turns) -> Turns:
            slot_turn, page_turn = turns
            head, number = m.div(unit, config.tiles), m.rem(unit, config.tiles)
            self.prepare(config, team, row, head, number, 1, number == 0)
            scalars = {"first": 0, "tiles": 1, "first_tile": number}
            turn_of = lambda i: slot_turn + (first - lowest) + i * CONSUMERS  # noqa: E731
            state = self.attend_blocks(config, team, turn_of, (first, CONSUMERS, own), scalars)
            place = {"first": 0, "tiles": 1, "base": team * ROWS}
            m.call(attention.store_part(config), (parts,), place, state)
            m.meet()
            self.merge_rows(config, team, row, parts, head, number * ROWS, ROWS, 0, ROWS, CONSUMERS, 1)
            m.meet()
            return slot_turn + blocks, page_turn

        return m.loop(row.first, row.last, one, turns)

    def merge_rows(self, config, team, row, parts, head, first_row, rows, base, step, count, ways) -> None:
        t, is_sliding = self.plan.target, config.window is not None
        sinks = (self.weights.sinks[is_sliding],) if config.has_sink else ()
        scalars = {"team": team, "head": head, "first_row": first_row, "rows": rows, "base": base, "step": step}
        scalars |= {"parts": count, "sink": row.layer * t.heads + head * config.group}
        self.machine.call(attention.merge(config, ways), (parts, *sinks, self.buffers.attended), scalars)

    def attend(self, team: Any, row: Row, turns: Turns) -> Turns:
        """Parts of the keys of a head: unit = head * key_parts + part."""
        m, plan, config = self.machine, self.plan, self.plan.attention(False)
        groups, at_once = plan.query_groups, plan.blocks_at_once
        group, among = m.rem(team, groups), m.div(team, groups)
        parts = plan.key_parts * at_once
        rows = config.tiles * ROWS

        def one(unit: Any, turns: Turns) -> Turns:
            slot_turn, page_turn = turns
            head, part = m.div(unit, plan.key_parts), m.rem(unit, plan.key_parts) * at_once
            first, own = attention.blocks_of(config, self.length, self.count, part + among, parts)
            self.prepare(config, team, row, head, 0, config.tiles, part == 0)
            scalars = {"first": group * WARPS, "tiles": config.tiles, "first_tile": 0}
            turn_of = lambda i: slot_turn + i * CONSUMERS + team  # noqa: E731
            state = self.attend_blocks(config, team, turn_of, (first, parts, own), scalars)
            base = (head * parts + part + among) * rows
            place = {"first": group * WARPS, "tiles": config.tiles, "base": base}
            m.call(attention.store_part(config), (self.buffers.partial,), place, state)
            m.meet()
            return slot_turn + self.blocks_of_part(config, part, parts) * groups, page_turn

        return m.loop(row.first, row.last, one, turns)

    def blocks_of_part(self, config: Attention, part: Any, parts: int) -> Any:
        """Blocks of all parts that a CTA attends to at the same time."""
        total = 0
        for among in range(self.plan.blocks_at_once):
            total += attention.blocks_of(config, self.length, self.count, part + among, parts)[1]
        return total

    def merge(self, team: Any, row: Row, turns: Turns) -> Turns:
        """Query after query."""
        m, config = self.machine, self.plan.attention(False)
        parts, rows = self.plan.key_parts * self.plan.blocks_at_once, config.tiles * ROWS
        # Parts beyond the blocks have no keys: they would change no bit.
        used = m.smaller(parts, attention.blocks_of(config, self.length, self.count, 0, 1)[1])

        def one(unit: Any, _: None) -> None:
            head, query = m.div(unit, config.query_rows), m.rem(unit, config.query_rows)
            base = head * parts * rows + query
            self.merge_rows(config, team, row, self.buffers.partial, head, query, 1, base, rows, used, 16)

        m.loop(row.first, row.last, one)
        return turns
