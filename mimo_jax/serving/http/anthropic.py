"""POST /v1/messages of Anthropic's API: a body becomes a turn, whose blocks become a message, or events."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from mimo_jax.serving.dialect import Part
from mimo_jax.serving.http import sse
from mimo_jax.serving.http.anthropic_blocks import messages_of
from mimo_jax.serving.http.blocks import Block, Blocks, Change
from mimo_jax.serving.http.conversation import Conversation
from mimo_jax.serving.http.errors import ANTHROPIC, from_exception
from mimo_jax.serving.http.sampling import (
    CONTENT,
    FLAG,
    OBJECT,
    OBJECTS,
    SAMPLING,
    TEXT,
    Field,
    Fields,
    is_stop,
    naming,
    one_of,
    read_fields,
    whole,
)
from mimo_jax.serving.http.service import Service
from mimo_jax.serving.http.turn import Run
from mimo_jax.serving.http.usage import tokens_of
from mimo_jax.serving.messages import checked_functions

COUNTED = {
    "model": TEXT,
    "system": CONTENT,
    "messages": OBJECTS,
    "tools": OBJECTS,
    "tool_choice": OBJECT,
    "thinking": OBJECT,
    "output_config": OBJECT,
}
MESSAGES = {
    **COUNTED,
    **{name: SAMPLING[name] for name in ("temperature", "top_p", "top_k", "stream", "metadata")},
    "max_tokens": whole(1),
    "stop_sequences": Field(lambda value: isinstance(value, list) and is_stop(value), SAMPLING["stop"].rule),
}
# Of fields that are objects.
TOOL = {"type": one_of("custom"), "input_schema": OBJECT}
TOOL_CHOICE = {"type": one_of("auto", "any", "tool", "none"), "name": TEXT, "disable_parallel_tool_use": FLAG}
THINKING = {"type": one_of("enabled", "adaptive", "disabled")}  # a budget is not kept to
OUTPUT = {"format": OBJECT}
FORMAT = {"type": one_of("json_schema"), "schema": OBJECT}

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
DELTAS = {
    Part.THINKING: ("thinking_delta", "thinking"),
    Part.ANSWER: ("text_delta", "text"),
    Part.NAME: ("input_json_delta", "partial_json"),
}


class Messages:
    """One request of this route."""

    def __init__(self, service: Service, body: Mapping[str, Any], account: str) -> None:
        fields = read_fields(body, MESSAGES, needed=["messages", "max_tokens"])
        service.check_name(fields.get("model"))
        self.is_streamed = fields.get("stream", False)
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": service.name,
        }
        with naming(MESSAGES, response_format="output_config.format"):
            sampling = {**fields, "stop": fields.get("stop_sequences", [])}
            self.turns = [conversation_of(fields).turn(service, sampling, account)]

    async def whole(self, run: Run) -> dict[str, Any]:
        blocks = Blocks()
        async for event in run:
            for piece in event.pieces:
                blocks.add(piece)
        return {**self._head, "content": [_content(block) for block in blocks.all], **_end(run), "usage": _usage(run)}

    async def messages(self, run: Run) -> AsyncIterator[bytes]:
        blocks = Blocks()
        try:
            begin = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(run)}
            yield sse.event({"type": "message_start", "message": begin})
            yield sse.event({"type": "ping"})
            async for event in run:
                for change in [change for piece in event.pieces for change in blocks.add(piece)]:
                    yield sse.event(_event(change))
            for change in blocks.close():
                yield sse.event(_event(change))
            yield sse.event({"type": "message_delta", "delta": _end(run), "usage": _usage(run)})
            yield sse.event({"type": "message_stop"})
        except Exception as error:
            yield sse.event(from_exception(error).body(ANTHROPIC))


def count_tokens(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST /v1/messages/count_tokens: of the prompt that a message's body would be rendered to."""
    fields = read_fields(body, COUNTED, needed=["messages"])
    service.check_name(fields.get("model"))
    with naming(COUNTED):
        return {"input_tokens": len(conversation_of(fields).ids(service))}


def _event(change: Change) -> dict[str, Any]:
    block = change.block
    if change.kind == "begin":
        return {"type": "content_block_start", "index": block.index, "content_block": _content(block)}
    if change.kind == "end":
        return {"type": "content_block_stop", "index": block.index}
    kind, name = DELTAS[block.part]
    return {"type": "content_block_delta", "index": block.index, "delta": {"type": kind, name: change.text}}


def _content(block: Block) -> dict[str, Any]:
    match block.part:
        case Part.THINKING:
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case Part.NAME:
            arguments = dict(_pairs(block.text))
            return {"type": "tool_use", "id": f"toolu_{block.id}", "name": block.name, "input": arguments}
    return {"type": "text", "text": block.text}


def _pairs(arguments: str) -> Iterator[tuple[str, Any]]:
    """Of a JSON object, as far as it goes: calls may be cut off."""
    decode, place = json.JSONDecoder().raw_decode, 1
    while place < len(arguments) - 1:
        try:
            key, place = decode(arguments, place)
            value, place = decode(arguments, place + len(": "))
        except ValueError:
            return
        yield key, value
        place += len(", ")


def _end(run: Run) -> dict[str, Any]:
    choice = run.choices[0]
    if choice.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_string}
    return {"stop_reason": REASONS[choice.finish or "stop"], "stop_sequence": None}


def _usage(run: Run) -> dict[str, int]:
    """So far. What the cache had is no input there."""
    tokens = tokens_of(run)
    return {
        "input_tokens": tokens.prompt - tokens.cached,
        "output_tokens": tokens.completion,
        "cache_read_input_tokens": tokens.cached,
        "cache_creation_input_tokens": 0,
    }


# What a body asks for.


def conversation_of(fields: Fields) -> Conversation:
    tools = fields.get("tools", [])
    for place, tool in enumerate(tools):
        read_fields(tool, TOOL, f"tools[{place}].", needed=["input_schema"])
    declared = checked_functions(tools, "tools[{}]", "input_schema")
    choice = read_fields(fields.get("tool_choice", {}), TOOL_CHOICE, "tool_choice.")
    kind = choice.get("type", "auto")
    if kind == "tool":
        read_fields(choice, TOOL_CHOICE, "tool_choice.", needed=["name"])
    thinking = read_fields(fields.get("thinking", {}), THINKING, "thinking.").get("type")
    return Conversation(
        messages_of(fields),
        [] if kind == "none" else declared,
        {"auto": "auto", "none": "auto", "any": "required"}.get(kind, choice),
        not choice.get("disable_parallel_tool_use", False),
        None if thinking is None else thinking != "disabled",
        {},
        *_schema(fields),
    )


def _schema(fields: Fields) -> tuple[Mapping[str, Any] | None, bool]:
    """What the answer must be, strictly; None for text."""
    answer = read_fields(fields.get("output_config", {}), OUTPUT, "output_config.").get("format")
    if answer is None:
        return None, False
    return read_fields(answer, FORMAT, "output_config.format.", needed=FORMAT)["schema"], True
