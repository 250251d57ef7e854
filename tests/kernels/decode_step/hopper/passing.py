"""How the protocol's products pass through ring and pages: who fills, who reads, and rings that wait for nothing."""

from __future__ import annotations

from typing import Any

from jax import lax

from pallas_kernels.decode_step.hopper.roles import Queue, Ring


def load_items(ring: Ring, turn: Any, items: Any, chunks: Any, copy: Any) -> Any:
    """Weights of a product, in the order of `multiply_items`: `copy(chunk, item, slot, barrier)` for each."""

    def one_chunk(chunk: Any, turn: Any) -> Any:
        def one_item(item: Any, turn: Any) -> Any:
            team = lax.rem(item, ring.teams)
            ring.fill(turn, team, lambda slot, barrier: copy(chunk, item, slot, barrier))
            return turn + 1

        return lax.fori_loop(0, items, one_item, turn)

    return lax.fori_loop(0, chunks, one_chunk, turn)


def fetch_parts(pages: Queue, turn: Any, parts: Any, copy: Any) -> Any:
    """Inputs of a product: `copy(part, place, barrier)` for each part."""

    def one_part(part: Any, turn: Any) -> Any:
        pages.before_fill(turn)
        place = pages.place(turn)
        copy(part, place, pages.full.at[place])
        return turn + 1

    return lax.fori_loop(0, parts, one_part, turn)


def multiply_items(
    ring: Ring,
    pages: Queue,
    turns: tuple,
    team: Any,
    items: Any,
    parts: Any,
    chunks_per_part: int,
    multiply: Any,
) -> tuple:
    """A product: `multiply(place of the page, chunk, item, slot)` for a team's items of each chunk, which ascend.

    `turns` are those of ring and pages, which every team counts whole.
    """

    def one_part(part: Any, turns: tuple) -> tuple:
        slot_turn, page_turn = turns
        pages.before_read(page_turn)

        def one_chunk(within: Any, turn: Any) -> Any:
            def one_item(number: Any, _: None) -> None:
                item = team + number * ring.teams
                ring.before_read(turn + item, team)
                place, chunk = ring.place(turn + item), part * chunks_per_part + within
                multiply(pages.place(page_turn), chunk, item, place)
                ring.freed(turn + item)

            own = lax.div(items - team + ring.teams - 1, ring.teams)
            lax.fori_loop(0, own, one_item, None)
            return turn + items

        slot_turn = lax.fori_loop(0, chunks_per_part, one_chunk, slot_turn)
        pages.freed(page_turn)
        return slot_turn, page_turn + 1

    return lax.fori_loop(0, parts, one_part, turns)


class Eager(Ring):
    """Waits for nothing."""

    def before_read(self, turn: Any, team: Any) -> None: ...

    def before_fill(self, turn: Any) -> None: ...


class EagerQueue(Queue):
    """The same."""

    def before_fill(self, turn: Any) -> None: ...
