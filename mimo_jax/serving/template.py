"""The checkpoint's own chat template: from a conversation to the prompt's token ids.

Names of special tokens become those tokens only where the template writes them. Where clients do, they are broken by
a character that occurs nowhere else; it goes away again when the text between special tokens is encoded, literally.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from jinja2 import Environment, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mimo_jax.checkpoint.files.tensorfile import load_json, read_bytes
from mimo_jax.errors import UserError, one_line
from mimo_jax.media.parts import Part
from mimo_jax.serving.dialect import CLOSE, OPEN, TURN, thinks
from mimo_jax.tokenizer import Tokenizer

CONFIG, OWN_FILE = "tokenizer_config.json", "chat_template.jinja"
# Variables by which templates write special tokens, whose names the config tells.
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MOST_BYTES = 1 << 22  # of either file
MOST_CHARACTERS = 1 << 24  # of a rendered conversation
FIRST_MARKER = 0x13000  # hieroglyphs: few write them, and no filter of Jinja or Python changes them


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A prompt: its token ids, and between them parts; the text, and whether it leaves the model thinking."""

    pieces: tuple[tuple[int, ...] | Part, ...]
    text: str
    thinks: bool

    @property
    def ids(self) -> tuple[int, ...]:
        """Of a prompt that is text alone."""
        return tuple(token for piece in self.pieces if not isinstance(piece, Part) for token in piece)


class ChatTemplate:
    """A template, and the `variables` it is always given."""

    def __init__(self, source: str, tokenizer: Tokenizer, variables: Mapping[str, str] | None = None) -> None:
        self._tokenizer, self._variables = tokenizer, dict(variables or {})
        try:
            functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
            self._template = _environment().from_string(source, functions)
        except TemplateSyntaxError as error:
            raise UserError(f"chat template: {one_line(error.message or '')} (line {error.lineno})") from None
        added = tokenizer.added_tokens
        self._ids = {name: added[name] for name in added if len(name) > 1}  # one character cannot be broken
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._names = (*self._ids, TURN, OPEN, CLOSE)
        self._beginnings = tuple(name[:size] for name in self._names for size in range(1, len(name)))
        self._ends = tuple(name[size:] for name in self._names for size in range(1, len(name)))
        self._characters = frozenset(source).union(*self._names)

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> ChatTemplate:
        """Reads the template of a checkpoint directory."""
        config_path, own_path = directory / CONFIG, directory / OWN_FILE
        config = load_json(read_bytes(config_path, MOST_BYTES), str(config_path)) if config_path.exists() else {}
        source = _read_text(own_path) if own_path.exists() else _default(config.get("chat_template"))
        if not isinstance(source, str):
            raise UserError(f"{directory}: no chat template; expected chat_template in {CONFIG}, or {OWN_FILE}")
        named = {name: config.get(name) for name in TOKEN_NAMES}
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
        return cls(source, tokenizer, {name: text for name, text in texts.items() if isinstance(text, str)})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> Rendered:
        """The prompt for the assistant's next message.

        `messages` and `tools` are `normalized` and `checked_tools`; without `thinking` the template decides about it.
        `options` are variables of the template, such as clients send as chat_template_kwargs.
        """
        given = {**options, "messages": messages, "tools": tools or None}
        parts = [part for message in messages for part in message["content"] if isinstance(part, Part)]
        with _explaining():
            marker, *marks = self._unused(given, 1 + len(parts))
            broken = self._broken(given, marker, dict(zip(parts, marks)))
        values = {**self._variables, **broken, "add_generation_prompt": True}
        if thinking is not None:
            values["enable_thinking"] = thinking
        text = self._text(values, marker)
        pieces, place = list[tuple[int, ...] | Part](), 0
        for part, mark in zip(parts, marks):
            before, found, rest = text[place:].partition(mark)
            if not found or mark in rest:
                raise UserError(
                    "chat template: it leaves out, repeats or reorders the images and recordings of messages"
                )
            pieces += [tuple(self._encoded(before, marker)), part]
            place += len(before) + 1
        pieces.append(tuple(self._encoded(text[place:], marker)))
        shown = text.translate({ord(mark): "" for mark in (marker, *marks)})
        return Rendered(tuple(pieces), shown, thinks(text))

    def _encoded(self, text: str, marker: str) -> Iterator[int]:
        for place, stretch in enumerate(self._split.split(text)):
            if place % 2:  # names stand at odd places
                yield self._ids[stretch]
            else:
                yield from self._tokenizer.encode(stretch.replace(marker, ""), literal=True)

    def _text(self, values: Mapping[str, Any], marker: str) -> str:
        """What the template makes of the values, with the marker in it."""
        parts, size = [], 0
        with _explaining(marker):
            for part in self._template.generate(values):
                size += len(part)
                if size > MOST_CHARACTERS:
                    raise UserError(f"its text passes {MOST_CHARACTERS:,} characters")
                parts.append(part)
        return "".join(parts)

    def _unused(self, values: Mapping[str, Any], count: int) -> list[str]:
        """Characters that neither the values nor the template has."""
        used = self._characters.union(json.dumps(values, ensure_ascii=False, default=lambda part: None))
        places = range(FIRST_MARKER, FIRST_MARKER + len(used) + count)
        return [char for char in map(chr, places) if char not in used][:count]

    def _broken(self, value: Any, marker: str, marks: Mapping[Part, str]) -> Any:
        """The value with its strings broken wherever the name of a special token is, or one could be completed, and
        with a mark in the place of each part.
        """
        if isinstance(value, Mapping):
            return {
                self._broken(key, marker, marks): self._broken(inner, marker, marks) for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            broken = [self._broken(inner, marker, marks) for inner in value]
            return "".join(broken) if any(isinstance(inner, Part) for inner in value) else broken
        if isinstance(value, Part):
            return marks[value]
        if not isinstance(value, str):
            return value
        for name in self._names:
            while name in value:  # a second time where it overlaps itself
                value = value.replace(name, name[0] + marker + name[1:])
        first = marker if value.startswith(self._ends) else ""
        last = marker if value.endswith(self._beginnings) else ""
        return first + value + last


def _environment() -> Environment:
    """As Hugging Face sets it up for templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is, where Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise UserError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@contextlib.contextmanager
def _explaining(marker: str = "") -> Iterator[None]:
    """A template is a program: whatever it raises is one line."""
    try:
        yield
    except RecursionError:
        raise UserError("chat template: the conversation is nested too deeply") from None
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"chat template: {one_line(reason.replace(marker, ''))}") from None


def _default(found: Any) -> Any:
    """The template, of several the one of this name."""
    if not isinstance(found, list):
        return found
    templates = [entry for entry in found if isinstance(entry, dict)]
    return next((entry.get("template") for entry in templates if entry.get("name") == "default"), None)


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 at byte {error.start}") from None
