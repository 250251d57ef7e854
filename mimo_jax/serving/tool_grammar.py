"""Calls of tools in MiMo's form as a grammar in Lark's notation: one rule per function, one per parameter.

The layout is rigid, and parameters come in the order in which they are declared; `dialect.Parser` reads the result.
Tools are as `messages.checked_tools` gives them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mimo_jax.errors import UserError
from mimo_jax.serving.dialect import CALL, END_CALL, END_FUNCTION, END_PARAMETER, FUNCTION, PARAMETER, is_text

Write = Callable[[Any], str]
_TEXT = f"text[suffix={json.dumps(END_PARAMETER)}]: /(?s:.*)/"


def chosen(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The functions that "required", or a function named as clients do, leaves to choose from."""
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, Mapping):
        name = choice.get("function", choice).get("name")
        functions = [function for function in functions if function["name"] == name]
    if not functions:
        raise UserError("tool_choice: no tool is declared that it allows")
    return functions


def grammar_of(
    functions: Sequence[Mapping[str, Any]], parallel: bool, tag: Write, json_value: Write, answer: str = ""
) -> str:
    """One call of one of the functions or, if `parallel`, one or more; or, if that is written, an `answer`.

    `tag` writes a tag that may be a token of its own, `json_value` what a schema describes.
    """
    more = ' ("\\n" call)*' if parallel else ""
    names = " | ".join(f"f{place}" for place in range(len(functions)))
    or_answer = f" | {answer}" if answer else ""
    rules = [f"start: call{more}{or_answer}", f'call: {tag(CALL)} "\\n" ({names}) "\\n" {tag(END_CALL)}', _TEXT]
    for place, function in enumerate(functions):
        rules += _rules(f"f{place}", function, json_value)
    return "\n".join(rules)


def _rules(rule: str, function: Mapping[str, Any], json_value: Write) -> Iterator[str]:
    """A function's rule, and those of its parameters, which are named after it."""
    schema = function.get("parameters") or {}
    required, declared = _required(function), schema.get("properties", {})
    properties = {**declared, **{key: {} for key in required if key not in declared}}
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parameters = [f"{rule}p{place}{'' if key in required else '?'}" for place, key in enumerate(properties)]
    begin, end = json.dumps(f"{FUNCTION}{function['name']}>\n"), json.dumps(END_FUNCTION)
    yield f"{rule}: {' '.join([begin, *parameters, end])}"
    for place, (key, inner) in enumerate(properties.items()):
        if ">" in key:
            raise UserError(f"tools: {function['name']} has a parameter whose name holds '>', which MiMo cannot write")
        begin, value = json.dumps(f"{PARAMETER}{key}>"), _text(inner)
        if not is_text(inner):
            value = f"{rule}v{place} {json.dumps(END_PARAMETER)}"
            yield f"{rule}v{place}: {json_value({**definitions, **inner} if _refers(inner) else inner)}"
        yield f'{rule}p{place}: {begin} {value} "\\n"'


def _required(function: Mapping[str, Any]) -> list[str]:
    required = (function.get("parameters") or {}).get("required") or []
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise UserError(f"tools: {function['name']}'s required parameters must be a list of names")
    return required


def _text(schema: Any) -> str:
    """A string up to its end's tag: any, or one of those to which its schema confines it."""
    schema = schema if isinstance(schema, Mapping) else {}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    values = values if isinstance(values, list) else []
    words = [value if isinstance(value, str) else json.dumps(value) for value in values]
    words = [json.dumps(word + END_PARAMETER) for word in words if END_PARAMETER not in word]
    return f"({' | '.join(words)})" if words else "text"


def _refers(schema: Any) -> bool:
    return '"$ref"' in json.dumps(schema)
