"""What /v1/responses gives: the items of a reply, and the events that tell how they grow."""

from __future__ import annotations

from typing import Any

from mimo_jax.serving.dialect import Part
from mimo_jax.serving.http.blocks import Block, Blocks, Change
from mimo_jax.serving.http.logprobs import Spelling, chat_rows
from mimo_jax.serving.http.turn import Event

# By parts: what an item's id begins with, and what its text is called in events.
IDS = {Part.THINKING: "rs_", Part.ANSWER: "msg_", Part.NAME: "fc_"}
TEXTS = {Part.THINKING: "reasoning_text", Part.ANSWER: "output_text", Part.NAME: "function_call_arguments"}
Told = tuple[str, dict[str, Any]]  # an event's kind, and its other fields


class Output:
    """The items of a reply as they grow; `take` and `close` tell it."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling, self._blocks = spelling, Blocks()
        # Of the one message that there is where they are asked for.
        self._rows: list[dict[str, Any]] = []
        self._told_rows = 0

    def items(self, status: str) -> list[dict[str, Any]]:
        """The last one has this status, and those before it are completed."""
        statuses = ["completed"] * (len(self._blocks.all) - 1) + [status]
        return [self._item(block, status) for block, status in zip(self._blocks.all, statuses)]

    def take(self, event: Event) -> list[Told]:
        self._rows += chat_rows(self._spelling, event.rows)["content"]
        changes = [change for piece in event.pieces for change in self._blocks.add(piece)]
        if event.rows and not changes:  # they are of text that was told before
            changes = [Change("delta", block) for block in self._blocks.all[-1:] if block.part == Part.ANSWER]
        return [told for change in changes for told in self._tell(change)]

    def close(self, status: str) -> list[Told]:
        return [told for change in self._blocks.close() for told in self._tell(change, status)]

    def _tell(self, change: Change, status: str = "completed") -> list[Told]:
        block, is_call = change.block, change.block.part == Part.NAME
        index, name = {"output_index": block.index}, TEXTS[block.part]
        place = {"item_id": _id(block), **index, **({} if is_call else {"content_index": 0})}
        if change.kind == "delta":
            return [(f"{name}.delta", {**place, "delta": change.text, **self._new_rows(block)})]
        parts = [] if is_call else [{**place, "part": self._part(block)}]
        if change.kind == "begin":
            added = [("content_part.added", part) for part in parts]
            return [("output_item.added", {**index, "item": self._item(block, "in_progress")}), *added]
        text = {"arguments" if is_call else "text": block.text, **self._all_rows(block)}
        done = [("content_part.done", part) for part in parts]
        return [
            (f"{name}.done", {**place, **text}),
            *done,
            ("output_item.done", {**index, "item": self._item(block, status)}),
        ]

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        own, parts = {"id": _id(block), "status": status}, [self._part(block)] if block.texts else []
        match block.part:
            case Part.THINKING:
                return {**own, "type": "reasoning", "summary": [], "content": parts}
            case Part.ANSWER:
                return {**own, "type": "message", "role": "assistant", "content": parts}
        call = {"call_id": f"call_{block.id}", "name": block.name, "arguments": block.text}
        return {**own, "type": "function_call", **call}

    def _part(self, block: Block) -> dict[str, Any]:
        annotations = {"annotations": []} if block.part == Part.ANSWER else {}
        return {"type": TEXTS[block.part], "text": block.text, **annotations, **self._all_rows(block)}

    def _all_rows(self, block: Block) -> dict[str, Any]:
        if block.part != Part.ANSWER:
            return {}
        return {"logprobs": self._rows if block.texts else []}

    def _new_rows(self, block: Block) -> dict[str, Any]:
        if block.part != Part.ANSWER:
            return {}
        first, self._told_rows = self._told_rows, len(self._rows)
        return {"logprobs": self._rows[first:]}


def _id(block: Block) -> str:
    return IDS[block.part] + block.id
