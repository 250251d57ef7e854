"""Structured output: grammars over token ids, as masks for a block of drafted tokens."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, regex_to_lark

from mimo_jax.errors import UserError
from mimo_jax.serving import tool_grammar
from mimo_jax.serving.dialect import CALL, CLOSE
from mimo_jax.serving.grammar_trial import LIMITS, compile_apart, failure, reason
from mimo_jax.tokenizer import Tokenizer

MOST_BYTES = 1 << 16  # of a schema
MOST_WRITTEN = 1 << 18  # of a grammar, which for tools is made of many schemas and repeats what they refer to
MOST_DEPTH = 64
MOST_NODES = 10_000
MOST_GRAMMARS = 32  # kept compiled

# Without forcing, all that spells an allowed text is allowed, not only what the tokenizer would make of it.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_ALL = np.uint32(0xFFFFFFFF)


class Grammars:
    """Compiles grammars for one tokenizer and keeps the latest. Any thread may call it.

    What is refused is a `UserError` of one line that names the parameter.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        """`vocab_size`: how many logits the model has, which may be more than the tokenizer has tokens."""
        if not stop_ids:
            raise UserError("grammars: the model has no stop token, by which a complete text ends")
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, tuple(stop_ids)
        self._lock = threading.Lock()  # one compiles at a time, however many are asked for
        self._compiled = functools.lru_cache(MOST_GRAMMARS)(self._compile)
        self._thinking = functools.cache(self._think)

    def json_schema(self, schema: Mapping[str, Any], strict: bool = False) -> Grammar:
        """Compact JSON, keys in the schema's order. If `strict`, keywords that cannot be enforced are refused."""
        _check_size("response_format", schema)
        return self._compiled("response_format", f"start: {_json_value(schema, strict)}")

    def json_object(self) -> Grammar:
        """Any JSON object, compact."""
        return self.json_schema({"type": "object"})

    def tool_calls(
        self, tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] = "required", parallel: bool = True
    ) -> Grammar:
        """Calls of tools and nothing else, one or, if `parallel`, more; `choice`: "required", or a named function."""
        return self._calls("tools", tool_grammar.chosen(tools, choice), parallel)

    def tool_calls_or_json(
        self, tools: Sequence[Mapping[str, Any]], parallel: bool, schema: Mapping[str, Any], strict: bool = False
    ) -> Grammar:
        """Calls of tools, or the answer that `json_schema` allows."""
        _check_size("response_format", schema)
        functions = tool_grammar.chosen(tools, "required")
        return self._calls("response_format beside tools", functions, parallel, _json_value(schema, strict))

    def _calls(self, what: str, functions: Sequence[Mapping[str, Any]], parallel: bool, answer: str = "") -> Grammar:
        for function in functions:
            _check_size("tools", function.get("parameters"))
        source = tool_grammar.grammar_of(functions, parallel, self._tag, _json_value, answer)
        return self._compiled(what, source, (CALL.encode(),))

    def regex(self, pattern: str) -> Grammar:
        """Texts that match as a whole."""
        try:
            return self._compiled("regex", f"start: /{regex_to_lark(pattern, '')}/")
        except UnicodeEncodeError:
            raise UserError("regex: holds half a character") from None

    def choice(self, texts: Sequence[str]) -> Grammar:
        """One of the texts."""
        return self._compiled("choice", f"start: {' | '.join(map(json.dumps, texts))}")

    def _compile(self, what: str, source: str, barred: tuple[bytes, ...] = ()) -> Grammar:
        if len(source) > MOST_WRITTEN:
            raise UserError(f"{what}: makes a grammar of more than {MOST_WRITTEN:,} bytes; it must be simpler")
        with self._lock:
            _refuse(what, compile_apart(_OPTIONS + source, self._vocab_size))
            start = functools.partial(LLMatcher, self._space, _OPTIONS + source, log_level=0, limits=LIMITS)
            return Grammar(what, start, self._thinking(barred), self._stop_ids)

    def _think(self, barred: tuple[bytes, ...]) -> _Thinking:
        ids = self._tokenizer.backend.get_vocab(with_added_tokens=True).values()
        pieces = {token: self._space.decode_bytes([token]) for token in ids}  # a special one's is its name
        return _Thinking(pieces, barred, self._stop_ids, self._vocab_size)

    def _tag(self, tag: str) -> str:
        """A tag as text and, where a token of its own stands for it, as that."""
        token = self._tokenizer.added_tokens.get(tag)
        is_special = token is not None and self._space.is_special_token(token)
        return f"({json.dumps(tag)} | <[{token}]>)" if is_special else json.dumps(tag)

    @functools.cached_property
    def _space(self) -> LLTokenizer:
        try:
            return LLTokenizer(self._tokenizer.backend.to_str(), self._vocab_size, list(self._stop_ids))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"grammars: cannot use this tokenizer ({str(error)[:200]})") from None


class Grammar:
    """A compiled grammar. Each text that is to follow it has a matcher of its own."""

    def __init__(
        self, name: str, start: Callable[[], LLMatcher], thinking: _Thinking, stop_ids: Collection[int]
    ) -> None:
        self._name, self._start, self._thinking, self._stop_ids = name, start, thinking, frozenset(stop_ids)
        self._first = self._started()

    def matcher(self, thinking: bool = False) -> GrammarMatcher:
        """For a text from its beginning or, where that is `thinking`, from the end of that on."""
        first = self._first.deep_copy()
        if failure(first):  # copies share a lexer, whose states a text may have used up
            self._first = self._started()
            first = self._first.deep_copy()
        return GrammarMatcher(first, self._thinking, self._stop_ids, thinking)

    def _started(self) -> LLMatcher:
        matcher = self._start()
        _refuse(self._name, failure(matcher))
        return matcher


class GrammarMatcher:
    """A `requests.Matcher` of one text. It takes no notice of a stop, which the engine does."""

    def __init__(self, matcher: LLMatcher, thinking: _Thinking, stop_ids: Collection[int], thinks: bool) -> None:
        self._matcher, self._thinking, self._stop_ids = matcher, thinking, stop_ids
        self._tail = b"" if thinks else None  # of what is being thought

    def masks(self, drafts: Sequence[int], out: np.ndarray) -> None:
        out[:] = _ALL
        words = out.shape[1]  # the library's masks may have one more, with a bit for its own end
        tail, taken = self._tail, 0
        for row, draft in enumerate(drafts):
            out[row] = self._mask(tail)[:words]
            if draft in self._stop_ids or not _has(out[row], draft):  # what follows is not reached
                break
            taken += tail is None
            tail = self._step(tail, draft)
        else:
            out[len(drafts)] = self._mask(tail)[:words]
        self._matcher.rollback(taken)

    def commit(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if token in self._stop_ids:
                return
            self._tail = self._step(self._tail, token)

    def _mask(self, tail: bytes | None) -> np.ndarray:
        if tail is not None:
            return self._thinking.mask(tail)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        _refuse("grammar: cannot go on", reason(self._matcher))  # and the mask would let the text stop
        return mask

    def _step(self, tail: bytes | None, token: int) -> bytes | None:
        if tail is not None:
            return self._thinking.after(tail, token)
        self._matcher.consume_token(token)
        _refuse("grammar: cannot go on", reason(self._matcher))
        return None


class _Thinking:
    """What may be thought before a grammar begins: everything but a stop, and but tags that are `barred`.

    The token that completes the end's tag must end with it, for the grammar begins with the next. Tags count however
    they are spelled, as they do for who reads them. Of the text so far only the tail matters, where it begins a tag.
    """

    def __init__(
        self, pieces: Mapping[int, bytes], barred: Sequence[bytes], stop_ids: Collection[int], vocab_size: int
    ) -> None:
        self._pieces, self._barred, self._tags = pieces, barred, [CLOSE.encode(), *barred]
        is_free = np.zeros(-(-vocab_size // 32) * 32, bool)
        is_free[list(pieces)], is_free[list(stop_ids)] = True, False
        self._free = np.packbits(is_free, bitorder="little").view(np.uint32)
        self._enders = [token for token, piece in pieces.items() if b">" in piece]  # all tags end so
        self._masks: dict[bytes, np.ndarray] = {}

    def mask(self, tail: bytes) -> np.ndarray:
        if tail not in self._masks:
            mask = self._free.copy()
            for token in self._enders:
                if self._is_refused(tail + self._pieces[token]):
                    mask[token >> 5] &= ~np.uint32(1 << (token & 31))
            self._masks[tail] = mask
        return self._masks[tail]

    def after(self, tail: bytes, token: int) -> bytes | None:
        """The tail after one more token; None if thinking has ended."""
        text = tail + self._pieces[token]
        if text.endswith(CLOSE.encode()):
            return None
        tail = text[max(text.rfind(b"<"), 0) :]
        return tail if any(tag.startswith(tail) for tag in self._tags) else b""

    def _is_refused(self, text: bytes) -> bool:
        before, _, after = text.partition(CLOSE.encode())
        return bool(after) or any(tag in before for tag in self._barred)


def _refuse(what: str, why: str) -> None:
    if why:
        raise UserError(f"{what}: {why}")


def _has(mask: np.ndarray, token: int) -> bool:
    return 0 <= token < 32 * len(mask) and bool(mask[token >> 5] >> (token & 31) & 1)


def _json_value(schema: Mapping[str, Any], strict: bool = False) -> str:
    options = {"whitespace_flexible": False, "lenient": not strict}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def _check_size(what: str, schema: Any) -> None:
    """Raises if a schema is larger than a sensible one, before anything reads it that recurses."""
    left, nodes = [(schema, 1)], 0
    while left:
        value, depth = left.pop()
        nodes += 1
        if depth > MOST_DEPTH or nodes > MOST_NODES:
            raise UserError(f"{what}: must not nest deeper than {MOST_DEPTH}, nor hold over {MOST_NODES:,} values")
        if isinstance(value, Mapping):
            left += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple):
            left += [(inner, depth + 1) for inner in value]
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError):
        raise UserError(f"{what}: must be JSON") from None
    if size > MOST_BYTES:
        raise UserError(f"{what}: {size:,} bytes; at most {MOST_BYTES:,} are compiled")
