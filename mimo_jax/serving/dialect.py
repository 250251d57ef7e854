"""What MiMo writes, taken apart as it arrives: thinking, answers and calls of tools.

    thinking </think> answer <tool_call> <function=NAME> <parameter=KEY>VALUE</parameter> ... </function> </tool_call>

Whitespace between tags is free, values are verbatim. However a text is cut into pieces, the pieces of each part join to
the same: what may be the beginning of a tag is kept back until it is one or not.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any

TURN = "<|im_start|>"
OPEN, CLOSE = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
Schemas = Mapping[str, Mapping[str, Any]]  # of each function's parameters, by its name


class Part(enum.Enum):
    """What a piece belongs to. Pieces of ARGUMENTS join to a JSON object, unless the call was cut off."""

    THINKING = "thinking"
    ANSWER = "answer"
    NAME = "name"  # of a call that begins
    ARGUMENTS = "arguments"


@dataclasses.dataclass(frozen=True)
class Piece:
    part: Part
    text: str
    call: int = -1  # which of the reply's calls


def thinks(prompt: str) -> bool:
    """Whether a rendered prompt leaves the model thinking. It is the turn at its end that decides, not an option."""
    turn = prompt.rpartition(TURN)[2]
    return turn.rfind(OPEN) > turn.rfind(CLOSE)


def schemas_of(tools: Sequence[Mapping[str, Any]] | None) -> Schemas | None:
    """Of tools as clients declare them; None, and tags of calls are plain text, if there are none."""
    if not tools:
        return None
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: (function.get("parameters") or {}).get("properties") or {} for function in functions}


class Parser:
    """`feed` and `close` return the pieces that are certain by then."""

    def __init__(self, thinking: bool = False, schemas: Schemas | None = None, is_parallel: bool = True) -> None:
        """Unless it `is_parallel`, a reply is over after its first call; what follows is not read."""
        self.schemas, self.calls, self.is_over = schemas, 0, False
        self._is_parallel = is_parallel
        self._left, self._pieces = "", list[Piece]()
        self._state = self._thinking if thinking else self._answer
        self._answered = False  # since the last tag
        self._entered = ""  # the tag by which a call was entered, which is text if it is none
        self._name, self._has_arguments, self._value = "", False, _Value(True)  # of the call under way

    def feed(self, text: str) -> list[Piece]:
        self._left += text
        self._run(False)
        return self._taken()

    def close(self, is_cut: bool = False) -> list[Piece]:
        """The text has ended, or a limit has cut it: then a call that is not complete stays so, and nobody makes it."""
        self._run(True)
        if self._state == self._in_function and not is_cut:
            self._end_arguments()
        return self._taken()

    def _run(self, is_end: bool) -> None:
        while self._state(is_end):
            pass

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # States: each takes what it can from the front of what is left, and says whether to go on.

    def _thinking(self, is_end: bool) -> bool:
        text, tag = self._until([CLOSE, *self._call_tags()], is_end)
        self._emit(Part.THINKING, text)
        if tag == CALL:
            self._enter(CALL)
        elif tag:
            self._state = self._answer
        return bool(tag)

    def _answer(self, is_end: bool) -> bool:
        is_first = not (self._answered or self.calls)
        text, tag = self._until([*self._call_tags(), *([OPEN] if is_first else [])], is_end)
        if not self._answered and not text.strip():  # space around tags is nobody's
            if not tag and not is_end:
                self._left = text + self._left
                return False
            text = ""
        self._emit(Part.ANSWER, text)
        self._answered = self._answered or bool(text)
        if tag == CALL:
            self._enter(CALL)
        elif tag and self._answered:  # too late for thinking
            self._emit(Part.ANSWER, tag)
        elif tag:
            self._state = self._thinking
        return bool(tag)

    def _in_call(self, is_end: bool) -> bool:
        """Before the name."""
        left = self._left.lstrip()
        name, has_name, rest = left.removeprefix(FUNCTION).partition(">")
        if left.startswith(FUNCTION) and has_name:
            self._left, self._name, self._has_arguments = rest, name, False
            self._pieces.append(Piece(Part.NAME, name, self.calls))
            self.calls += 1
            self._state = self._in_function
        elif not is_end and (left.startswith(FUNCTION) or FUNCTION.startswith(left)):
            return False
        else:  # no call after all
            self._emit(Part.ANSWER, self._entered)
            self._state, self._answered = self._answer, True
        return True

    def _in_function(self, is_end: bool) -> bool:
        """Between values. What is neither is no part of a call, and left out."""
        _, tag = self._until([PARAMETER, END_FUNCTION, END_CALL, CALL, FUNCTION], is_end)
        if tag == PARAMETER:
            self._state = self._in_key
        elif tag:
            self._end_arguments()
            if not self._is_parallel:
                self._state, self.is_over = self._nothing, True
            elif tag == CALL:  # here and below, the ends are missing
                self._enter(CALL)
            elif tag == FUNCTION:
                self._left = FUNCTION + self._left
                self._enter("")
            else:
                self._state = self._after_function if tag == END_FUNCTION else self._answer
        return bool(tag)

    def _after_function(self, is_end: bool) -> bool:
        """The end of the call may be missing, and another function may follow."""
        left = self._left.lstrip()
        if left.startswith(END_CALL):
            self._left, self._state = left.removeprefix(END_CALL), self._answer
        elif left.startswith(FUNCTION):
            self._left = left
            self._enter("")
        elif not is_end and (END_CALL.startswith(left) or FUNCTION.startswith(left)):
            return False
        else:
            self._state = self._answer
        return True

    def _in_key(self, is_end: bool) -> bool:
        key, found, rest = self._left.partition(">")
        if not found:
            return False
        self._left, self._state = rest, self._in_value
        self._value = _Value(is_text((self.schemas or {}).get(self._name, {}).get(key)))
        prefix = ", " if self._has_arguments else "{"
        self._has_arguments = True
        self._emit(Part.ARGUMENTS, f"{prefix}{_quoted(key)}: {self._value.begin()}", self.calls - 1)
        return True

    def _in_value(self, is_end: bool) -> bool:
        text, tag = self._until([END_PARAMETER], is_end)
        self._emit(Part.ARGUMENTS, self._value.add(text), self.calls - 1)
        if tag:
            self._emit(Part.ARGUMENTS, self._value.end(), self.calls - 1)
            self._state = self._in_function
        return bool(tag)

    def _nothing(self, is_end: bool) -> bool:
        self._left = ""
        return False

    # What states share.

    def _call_tags(self) -> list[str]:
        return [] if self.schemas is None else [CALL]

    def _until(self, tags: Sequence[str], is_end: bool) -> tuple[str, str]:
        """What comes before the first of the tags, and that tag; both are gone from what is left."""
        places = [(place, tag) for tag in tags if (place := self._left.find(tag)) >= 0]
        if places:
            place, tag = min(places)
            text, self._left = self._left[:place], self._left[place + len(tag) :]
            return text, tag
        kept = 0 if is_end else _kept_back(self._left, tags)
        cut = len(self._left) - kept
        text, self._left = self._left[:cut], self._left[cut:]
        return text, ""

    def _enter(self, tag: str) -> None:
        """A call, by its own tag or, where that is missing, by none; a function's is still to be read."""
        self._entered, self._answered, self._state = tag, False, self._in_call

    def _emit(self, part: Part, text: str, call: int = -1) -> None:
        if text:
            self._pieces.append(Piece(part, text, call))

    def _end_arguments(self) -> None:
        self._emit(Part.ARGUMENTS, "}" if self._has_arguments else "{}", self.calls - 1)


class _Value:
    """A parameter's value as JSON: text as it arrives, anything else once it is whole."""

    def __init__(self, is_text: bool) -> None:
        self.is_text, self.whole = is_text, ""

    def begin(self) -> str:
        return '"' if self.is_text else ""

    def add(self, text: str) -> str:
        if self.is_text:
            return _quoted(text)[1:-1]
        self.whole += text
        return ""

    def end(self) -> str:
        if self.is_text:
            return '"'
        try:
            found = json.dumps(json.loads(self.whole), ensure_ascii=False, allow_nan=False)
            found.encode()
            return found
        except (ValueError, RecursionError):  # also of numbers that are none, and of halves of characters
            return _quoted(self.whole)


def is_text(schema: Any) -> bool:
    """Whether a parameter is a string, for all that its schema says; then `null` is a word."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return kind is None or kind == "string" or (isinstance(kind, list) and "string" in kind)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _kept_back(text: str, tags: Sequence[str]) -> int:
    """Characters at the end that may be the beginning of a tag."""
    longest = min(len(text), max(map(len, tags), default=1) - 1)
    sizes = range(longest, 0, -1)
    return next((size for size in sizes if any(tag.startswith(text[-size:]) for tag in tags)), 0)
