"""POST /v1/chat/completions: a body becomes a turn, whose pieces become a message, or the deltas of one."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from mimo_jax.serving.attachments import Attachments
from mimo_jax.serving.dialect import Part, Piece
from mimo_jax.serving.http import sse
from mimo_jax.serving.http.conversation import Conversation
from mimo_jax.serving.http.errors import bad_request
from mimo_jax.serving.http.logprobs import chat_rows
from mimo_jax.serving.http.sampling import (
    FLAG,
    LIST,
    LOGPROBS,
    OBJECT,
    SAMPLING,
    TEXT,
    Field,
    Fields,
    naming,
    one_of,
    read_fields,
)
from mimo_jax.serving.http.service import Service
from mimo_jax.serving.http.turn import Run
from mimo_jax.serving.http.usage import StreamUsage, counts
from mimo_jax.serving.messages import checked_tools, normalized
from mimo_jax.serving.requests import Logprob

CHAT = {
    **SAMPLING,
    "messages": LIST,
    "logprobs": FLAG,
    "top_logprobs": LOGPROBS,
    "tools": LIST,
    "tool_choice": Field(lambda value: isinstance(value, str | dict), "a string or an object"),
    "parallel_tool_calls": FLAG,
    "response_format": OBJECT,
    "reasoning_effort": TEXT,
    "thinking": OBJECT,
    "chat_template_kwargs": OBJECT,
}
# Of fields that are objects, or may be.
TOOL_CHOICE = {"tool_choice": one_of("none", "auto", "required")}
NAMED_TOOL = {"type": one_of("function"), "function": OBJECT}
FORMAT = {"type": one_of("text", "json_object", "json_schema"), "json_schema": OBJECT}
SCHEMA = {"name": TEXT, "schema": OBJECT, "strict": FLAG}
THINKING = {"type": one_of("enabled", "disabled")}
TEMPLATE_OPTIONS = {"enable_thinking": FLAG}


class Chat:
    """One request of this route."""

    def __init__(self, service: Service, body: Mapping[str, Any], account: str) -> None:
        fields = read_fields(body, CHAT)
        service.check_name(fields.get("model"))
        self.is_streamed, self._usage = fields.get("stream", False), StreamUsage(fields)
        self._spelling, self._head = service.spelling, service.head("chatcmpl-", "chat.completion")
        self._top_logprobs = _top_logprobs(fields)
        with naming(CHAT):
            self.turns = [conversation(fields, service.attachments).turn(service, fields, account, self._top_logprobs)]

    async def whole(self, run: Run) -> dict[str, Any]:
        pieces: list[list[Piece]] = [[] for _ in run.choices]
        rows: list[list[Logprob]] = [[] for _ in run.choices]
        async for event in run:
            pieces[event.choice] += event.pieces
            rows[event.choice] += event.rows
        choices = [
            {
                "index": index,
                "message": message_of(pieces[index]),
                "logprobs": self._logprobs(rows[index]),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(run.choices)
        ]
        return {**self._head, "choices": choices, **counts(run)}

    async def messages(self, run: Run) -> AsyncIterator[bytes]:
        for index in range(len(run.choices)):
            yield self._chunk(run, index, {"role": "assistant", "content": ""})
        async for event in run:
            rows = self._logprobs(event.rows) if event.rows else None
            deltas = [delta_of(piece) for piece in event.pieces] or ([{}] if rows else [])
            for delta in deltas:
                yield self._chunk(run, event.choice, delta, rows)
                rows = None
            if event.finish:
                yield self._chunk(run, event.choice, {}, finish=event.finish)
        if self._usage.is_included:
            yield sse.message({**self._head, "object": "chat.completion.chunk", "choices": [], **counts(run)})
        yield sse.DONE

    def _logprobs(self, rows: Sequence[Logprob]) -> dict[str, Any] | None:
        return None if self._top_logprobs is None else chat_rows(self._spelling, rows)

    def _chunk(
        self, run: Run, index: int, delta: dict[str, Any], rows: dict[str, Any] | None = None, finish: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": rows, "finish_reason": finish}
        head = {**self._head, "object": "chat.completion.chunk"}
        return sse.message({**head, "choices": [choice], **self._usage.of_chunk(run)})


def delta_of(piece: Piece) -> dict[str, Any]:
    """What a piece adds to a message. A call begins with its name, and gets its id then."""
    match piece.part:
        case Part.ANSWER:
            return {"content": piece.text}
        case Part.THINKING:
            return {"reasoning_content": piece.text}
        case Part.NAME:
            function = {"name": piece.text, "arguments": ""}
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        case Part.ARGUMENTS:
            call = {"function": {"arguments": piece.text}}
    return {"tool_calls": [{"index": piece.call, **call}]}


def message_of(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The message that the deltas of all pieces add up to."""
    texts = defaultdict[tuple[Part, int], list[str]](list)
    for piece in pieces:
        texts[piece.part, piece.call].append(piece.text)
    calls = [delta_of(piece)["tool_calls"][0] for piece in pieces if piece.part == Part.NAME]
    for call in calls:
        call["function"]["arguments"] = "".join(texts[Part.ARGUMENTS, call.pop("index")])
    answer, thinking = ("".join(texts[part, -1]) for part in (Part.ANSWER, Part.THINKING))
    return {
        "role": "assistant",
        "content": answer or (None if calls else ""),
        **({"reasoning_content": thinking} if thinking else {}),
        **({"tool_calls": calls} if calls else {}),
    }


# What a body asks for.


def conversation(fields: Fields, attachments: Attachments) -> Conversation:
    """Of a body's fields, those of `CHAT` that do not sample."""
    messages, tools = normalized(fields.get("messages"), attachments), checked_tools(fields.get("tools"))
    choice = _tool_choice(fields)
    options = fields.get("chat_template_kwargs", {})
    answer = read_fields(fields.get("response_format", {}), FORMAT, "response_format.")
    if choice == "none":
        tools, choice = [], "auto"
    return Conversation(
        messages,
        tools,
        choice,
        fields.get("parallel_tool_calls", True),
        _thinking(fields),
        {name: value for name, value in options.items() if name not in TEMPLATE_OPTIONS},
        *_schema(answer),
    )


def _tool_choice(fields: Fields) -> str | Mapping[str, Any]:
    choice = fields.get("tool_choice", "auto")
    if isinstance(choice, str):
        return read_fields({"tool_choice": choice}, TOOL_CHOICE)["tool_choice"]
    return read_fields(choice, NAMED_TOOL, "tool_choice.").get("function", {})


def _schema(answer: Fields) -> tuple[Mapping[str, Any] | None, bool]:
    """What the answer must be, None for text; and whether strictly."""
    kind = answer.get("type", "text")
    if kind != "json_schema":
        return ({"type": "object"} if kind == "json_object" else None), False
    found = read_fields(answer.get("json_schema", {}), SCHEMA, "response_format.json_schema.", needed=["schema"])
    return found["schema"], found.get("strict", False)


def _thinking(fields: Fields) -> bool | None:
    """The most particular of the ways to ask decides."""
    options = read_fields(fields.get("chat_template_kwargs", {}), TEMPLATE_OPTIONS, "chat_template_kwargs.")
    kind = read_fields(fields.get("thinking", {}), THINKING, "thinking.").get("type")
    effort = fields.get("reasoning_effort")
    asked = [options.get("enable_thinking"), kind and kind == "enabled", effort and effort != "none"]
    return next((bool(wish) for wish in asked if wish is not None), None)


def _top_logprobs(fields: Fields) -> int | None:
    if fields.get("logprobs"):
        return fields.get("top_logprobs", 0)
    if fields.get("top_logprobs"):
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    return None
