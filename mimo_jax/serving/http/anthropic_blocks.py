"""What /v1/messages takes for a conversation, a system prompt and messages of blocks, as messages for the template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mimo_jax.serving.http.errors import bad_request
from mimo_jax.serving.http.sampling import CONTENT, OBJECT, TEXT, Field, Fields, one_of, read_fields
from mimo_jax.serving.messages import text_of

Message = dict[str, Any]

MESSAGE = {"role": one_of("user", "assistant", "system"), "content": CONTENT}
# By a block's type: what it must have.
BLOCKS: dict[str, dict[str, Field]] = {
    "text": {"text": TEXT},
    "thinking": {"thinking": TEXT},
    "tool_use": {"id": TEXT, "name": TEXT, "input": OBJECT},
    "tool_result": {"tool_use_id": TEXT},
}
RESULT = {"content": CONTENT}
ALLOWED = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use"), "system": ("text",)}
# Of a system prompt's part that is for Anthropic's accounting. It changes with every request, and with it in front no
# prompt would begin like the one before.
ACCOUNTING = "x-anthropic-billing-header"


def messages_of(fields: Fields) -> list[Message]:
    """Of `system` and `messages`. Raises errors that name the field."""
    found: list[Message] = []
    for place, message in enumerate(fields["messages"]):
        where = f"messages[{place}]"
        given = read_fields(message, MESSAGE, f"{where}.", needed=MESSAGE)
        role, blocks = given["role"], given["content"]
        if isinstance(blocks, str):
            blocks = [{"type": "text", "text": blocks}]
        checked = [_block(block, ALLOWED[role], f"{where}.content[{at}]") for at, block in enumerate(blocks)]
        found += [_reply(checked)] if role == "assistant" else _told(role, checked)
    if not found or found[-1]["role"] == "assistant":
        raise bad_request("messages: the last one must not be the model's; it does not go on with replies", "messages")
    return _system(fields.get("system", [])) + found


def _system(system: Any) -> list[Message]:
    text = text_of(system, "system")
    if not isinstance(system, str):
        text = "".join(part["text"] for part in system if not part["text"].startswith(ACCOUNTING))
    return [{"role": "system", "content": text}] if text else []


def _block(block: Any, kinds: tuple[str, ...], where: str) -> Mapping[str, Any]:
    """Its fields, of which all that its type needs are there."""
    if not OBJECT.holds(block):
        raise bad_request(f"{where} must be {OBJECT.rule}", where)
    kind = read_fields(block, {"type": one_of(*kinds)}, f"{where}.", needed=["type"])["type"]
    fields = read_fields(block, BLOCKS[kind], f"{where}.", needed=BLOCKS[kind])
    if kind == "tool_result":
        fields["text"] = text_of(read_fields(block, RESULT, f"{where}.").get("content"), f"{where}.content")
    return {"type": kind, **fields}


def _told(role: str, blocks: list[Mapping[str, Any]]) -> list[Message]:
    """A message for each result of a tool, and for the text between them."""
    found: list[Message] = []
    for block in blocks:
        if block["type"] == "tool_result":
            found.append({"role": "tool", "content": block["text"], "tool_call_id": block["tool_use_id"]})
        elif found and found[-1]["role"] == role:
            found[-1]["content"] += block["text"]
        else:
            found.append({"role": role, "content": block["text"]})
    return found


def _reply(blocks: list[Mapping[str, Any]]) -> Message:
    texts = {kind: "".join(block[kind] for block in blocks if block["type"] == kind) for kind in ("text", "thinking")}
    calls = [
        {"type": "function", "function": {"name": block["name"], "arguments": block["input"]}, "id": block["id"]}
        for block in blocks
        if block["type"] == "tool_use"
    ]
    return {
        "role": "assistant",
        "content": texts["text"],
        **({"reasoning_content": texts["thinking"]} if texts["thinking"] else {}),
        **({"tool_calls": calls} if calls else {}),
    }
