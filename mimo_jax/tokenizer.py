"""Byte-level BPE in the Qwen2 family's form, by the `tokenizers` library."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from mimo_jax.errors import UserError

END_OF_TEXT, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, "<think>", "</think>", MASK)

# Qwen2's pre-tokenizer: contractions, words, single digits, punctuation runs, line ends, spaces.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_MAX_BYTES = 1 << 27  # the largest published ones have some 20 MB
_MAX_GROWTH = 64  # a published normaliser puts one character, or three, in place of one


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learns merges on `texts`; the special tokens take the first ids."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a `tokenizer.json`, but for truncation and padding, which are for batches of training."""
        if not path.is_file():
            raise UserError(f"{path}: not found; a checkpoint folder needs its tokenizer")
        return cls.parse(_read(path), str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> Tokenizer:
        """The content of a `tokenizer.json`; `where` begins the error if it is none."""
        with _refusing(f"{where}: not a readable tokenizer"):
            _check_growth(json.loads(text), where)
            backend = tokenizers.Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        return cls(backend)

    def save(self, path: Path) -> None:
        self.backend.save(str(path))

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, literal: bool = False) -> list[int]:
        """Token ids of a text; in a `literal` one, the names of special tokens are text like any other."""
        with _refusing("tokenizer: this text cannot be encoded"):
            backend = self._literal if literal else self.backend
            return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many literal texts, such as source files."""
        with _refusing("tokenizer: these texts cannot be encoded"):
            encodings = self._literal.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], visible: Collection[int] = ()) -> str:
        """Text of `ids` without special tokens, but for `visible` ones; incomplete UTF-8 shows as U+FFFD."""
        hidden = self._special_ids.difference(visible)
        with _refusing("tokenizer: these ids cannot be decoded"):
            return self.backend.decode([token for token in ids if token not in hidden], skip_special_tokens=False)

    @functools.cached_property
    def added_tokens(self) -> dict[str, int]:
        """Ids by name of what stands beside the merges: special tokens, and others that are read whole all the same."""
        return {token.content: token_id for token_id, token in self.backend.get_added_tokens_decoder().items()}

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """The same without added tokens in what it reads; the library passes over special ones only."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens(list(self.added_tokens))
        backend.encode_special_tokens = True
        return backend

    def id_of(self, token: str) -> int:
        """The id of a token that must exist."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"tokenizer: has no token {token!r}")
        return token_id

    def byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for; special tokens stand for none."""
        lengths = [0] * self.vocab_size
        for token, token_id in self.backend.get_vocab().items():
            lengths[token_id] = 0 if token_id in self._special_ids else len(token)
        return lengths


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes; a tokenizer has at most {_MAX_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable tokenizer ({error})") from None


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """The library raises bare exceptions, and panics, which are none: one line for either."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{what} ({reason[0][:200]})") from None


def _check_growth(values: Any, where: str) -> None:
    """Raises where a normaliser or a decoder replaces characters by ever longer texts, one after the other."""
    for part in ("normalizer", "decoder"):
        growth = math.prod(_growths(values.get(part) if isinstance(values, dict) else None))
        if growth > _MAX_GROWTH:
            raise UserError(f"{where}: its {part} makes text {growth:,} times as long; at most {_MAX_GROWTH} is read")


def _growths(part: Any) -> Iterator[int]:
    """By how much each replacement of a part, or of those it consists of, may lengthen a text."""
    if isinstance(part, list):
        for inner in part:
            yield from _growths(inner)
    elif isinstance(part, dict):
        if part.get("type") in ("Replace", "Prepend") and isinstance(part.get("content", part.get("prepend")), str):
            yield max(1, len(part.get("content", part.get("prepend"))))
        for key in ("normalizers", "decoders"):
            yield from _growths(part.get(key))
