"""What /v1/responses takes for a conversation, instructions and items, as messages for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mimo_jax.serving.http.sampling import CONTENT, OBJECTS, TEXT, Field, Fields, one_of, read_fields
from mimo_jax.serving.messages import ROLES, arguments_of, text_of

Message = dict[str, Any]

# By an item's type: what it may be, and what it must have.
MESSAGE = {"role": one_of("user", "assistant", "system", "developer"), "content": CONTENT}
CALL = {"call_id": TEXT, "name": TEXT, "arguments": TEXT}
OUTPUT = {"call_id": TEXT, "output": Field(CONTENT.holds, CONTENT.rule)}
REASONING = {"content": OBJECTS}
TEXTS = ("input_text", "output_text", "text")  # types of parts


def messages_of(fields: Fields) -> list[Message]:
    """Of `instructions` and `input`. Raises errors that name the field."""
    instructions, given = fields.get("instructions"), fields["input"]
    messages = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for place, item in enumerate(given):
        where = f"input[{place}]"
        kind = read_fields(item, ITEM, f"{where}.").get("type", "message")
        ITEMS[kind](messages, item, where)
    return messages


def _message(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    fields = read_fields(item, MESSAGE, f"{where}.", needed=MESSAGE)
    role, text = ROLES[fields["role"]], text_of(fields["content"], f"{where}.content", TEXTS)
    if role != "assistant":
        messages.append({"role": role, "content": text})
        return
    last = _last_reply(messages)
    _reply(messages, begins=bool(last.get("content")) and "tool_calls" not in last)["content"] += text


def _reasoning(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    """The model's own text; summaries, and what others have encrypted, say nothing to it."""
    parts = read_fields(item, REASONING, f"{where}.").get("content", [])
    if text := text_of(parts, f"{where}.content", ("reasoning_text",)):
        last = _last_reply(messages)
        message = _reply(messages, begins=bool(last.get("content")) or "tool_calls" in last)
        message["reasoning_content"] = message.get("reasoning_content", "") + text


def _call(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    fields = read_fields(item, CALL, f"{where}.", needed=CALL)
    arguments = arguments_of(fields["arguments"], f"{where}.arguments")
    call = {"type": "function", "function": {"name": fields["name"], "arguments": arguments}, "id": fields["call_id"]}
    _reply(messages).setdefault("tool_calls", []).append(call)


def _output(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    fields = read_fields(item, OUTPUT, f"{where}.", needed=OUTPUT)
    text = text_of(fields["output"], f"{where}.output", TEXTS)
    messages.append({"role": "tool", "content": text, "tool_call_id": fields["call_id"]})


ITEMS = {"message": _message, "reasoning": _reasoning, "function_call": _call, "function_call_output": _output}
ITEM = {"type": one_of(*ITEMS)}

# Of one reply several items tell: its reasoning, then its texts and calls in any order.


def _last_reply(messages: Sequence[Message]) -> Message:
    return messages[-1] if messages and messages[-1]["role"] == "assistant" else {}


def _reply(messages: list[Message], begins: bool = False) -> Message:
    """The message that an item adds to: the assistant's that is last, unless the item begins another."""
    if begins or not _last_reply(messages):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]
