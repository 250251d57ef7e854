"""Conversations and tools as clients send them (OpenAI's chat form), in the one form that templates get."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mimo_jax.errors import UserError
from mimo_jax.media.parts import Part
from mimo_jax.serving.attachments import MOST, TEXT_ALONE, Attachments
from mimo_jax.serving.dialect import CLOSE, OPEN

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
REASONING = ("reasoning_content", "reasoning")  # the same by two names; the first one found counts
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def normalized(messages: Any, attachments: Attachments = TEXT_ALONE) -> list[dict[str, Any]]:
    """The messages with `role` and `content`, a string, or with `attachments` a list of strings and parts; nothing but
    these, and what their roles add:

    of the assistant `reasoning_content` and `tool_calls` with mappings for arguments, of a tool `tool_call_id`. Unknown
    fields are dropped. Raises a `UserError` that names the field.
    """
    if not isinstance(messages, list | tuple) or not messages:
        _refuse("messages", messages, "a list of at least one message")
    found = [_message(message, f"messages[{place}]", attachments) for place, message in enumerate(messages)]
    count = sum(isinstance(part, Part) for message in found for part in message["content"])
    if count > MOST:
        raise UserError(f"messages: {count} images, recordings and videos; at most {MOST} are read")
    return found


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools with `name`, `description` and `parameters` alone; null is none. Raises as `normalized` does."""
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        _refuse("tools", tools, "a list")
    functions = [_function(tool, f"tools[{place}]") for place, tool in enumerate(tools)]
    return checked_functions(functions, "tools[{}].function")


def checked_functions(
    functions: Sequence[Mapping[str, Any]], where: str, parameters: str = "parameters"
) -> list[dict[str, Any]]:
    """Tools of functions, which clients put at `where` with their schemas under the name of `parameters`."""
    checked = [_tool(function, where.format(place), parameters) for place, function in enumerate(functions)]
    names = [tool["function"]["name"] for tool in checked]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(f"{where.format(place)}.name={name!r} is declared twice")
    return checked


def _message(message: Any, where: str, attachments: Attachments) -> dict[str, Any]:
    message = _object(message, where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        _refuse(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    content, at = message.get("content"), f"{where}.content"
    if role == "assistant":
        found: dict[str, Any] = {"role": role, "content": text_of(content, at)}
        found |= _reasoning(message, found["content"], where)
        if calls := _calls(message.get("tool_calls"), f"{where}.tool_calls"):
            found["tool_calls"] = calls
        return found
    found = {"role": ROLES[role], "content": _content(content, at, attachments)}
    if role == "tool":
        found["tool_call_id"] = _text(message.get("tool_call_id"), f"{where}.tool_call_id")
    return found


def text_of(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of a string, of null, or of a list of parts, whose types must be among `kinds`."""
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        return "".join(_part(part, f"{where}[{place}]", kinds) for place, part in enumerate(content))
    if not isinstance(content, str):
        _refuse(where, content, "a string, a list of text parts, or null")
    return _text(content, where)


def _content(content: Any, where: str, attachments: Attachments) -> str | list[str | Part]:
    """Text as `text_of` has it; or if parts are none, a list of texts and these."""
    if not attachments.kinds or not isinstance(content, list | tuple):
        return text_of(content, where)
    found = [_part_or_text(part, f"{where}[{place}]", attachments) for place, part in enumerate(content)]
    return found if any(isinstance(part, Part) for part in found) else "".join(map(str, found))


def _part_or_text(part: Any, where: str, attachments: Attachments) -> str | Part:
    if _object(part, where).get("type") in attachments.kinds:
        return attachments.part(part, where)
    return _part(part, where, ("text",), attachments.kinds)


def _part(part: Any, where: str, kinds: Sequence[str], others: Sequence[str] = ()) -> str:
    kind = _object(part, where).get("type")
    if kind not in kinds:
        _refuse(f"{where}.type", kind, f"{' or '.join(map(repr, (*kinds, *others)))}; this model reads nothing else")
    return _text(part.get("text"), f"{where}.text")


def _reasoning(message: Mapping[str, Any], content: str, where: str) -> dict[str, str]:
    """The fields of a message with reasoning: in a field of its own, or in front of the content."""
    for name in REASONING:
        if message.get(name) is not None:
            return {"reasoning_content": _text(message[name], f"{where}.{name}")}
    begun, opened, rest = content.partition(OPEN)
    reasoning, closed, answer = rest.partition(CLOSE)
    if not opened or not closed or begun.strip():
        return {}
    return {"reasoning_content": reasoning, "content": answer}


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is not None and not isinstance(calls, list | tuple):
        _refuse(where, calls, "a list")
    return [_call(call, f"{where}[{place}]") for place, call in enumerate(calls or ())]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = _function(call, where)
    name = _text(function.get("name"), f"{where}.function.name")
    arguments = arguments_of(function.get("arguments"), f"{where}.function.arguments")
    found = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        found["id"] = _text(call["id"], f"{where}.id")
    return found


def arguments_of(text: Any, where: str) -> Mapping[str, Any]:
    """Templates go through a call's arguments by name."""
    rule = "a string that holds a JSON object"
    if not isinstance(text, str):
        _refuse(where, text, rule)
    try:
        found = json.loads(text or "{}")  # of a call without arguments some clients make an empty string
    except (ValueError, RecursionError):
        _refuse(where, text, rule)
    if not isinstance(found, dict):
        _refuse(where, text, rule)
    return found


def _tool(function: Mapping[str, Any], where: str, parameters: str) -> dict[str, Any]:
    name, schema = function.get("name"), function.get(parameters)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(f"{where}.name", name, "1 to 64 of the characters a-z, A-Z, 0-9, '_', '.' and '-'")
    found: dict[str, Any] = {"name": name}
    if function.get("description") is not None:
        found["description"] = _text(function["description"], f"{where}.description")
    if schema is not None:
        found["parameters"] = _schema(schema, f"{where}.{parameters}")
    return {"type": "function", "function": found}


def _schema(schema: Any, where: str) -> Mapping[str, Any]:
    if _object(schema, where).get("type", "object") != "object":
        _refuse(f"{where}.type", schema["type"], "'object'")
    _object(schema.get("properties", {}), f"{where}.properties")
    return schema


def _function(value: Any, where: str) -> Mapping[str, Any]:
    """What stands in the field "function" of a tool, or of a call of one."""
    kind = _object(value, where).get("type", "function")
    if kind != "function":
        _refuse(f"{where}.type", kind, "'function'")
    return _object(value.get("function"), f"{where}.function")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        _refuse(where, value, "an object")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        _refuse(where, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell it
        raise UserError(f"{where}: half of a surrogate pair at character {error.start} is no text") from None
    return value


def _refuse(where: str, value: Any, rule: str) -> NoReturn:
    raise UserError(f"{where}={reprlib.repr(value)} must be {rule}")
