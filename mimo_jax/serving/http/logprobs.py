"""Logarithms of probabilities as the two routes show them: natural ones, before temperature and filters."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from mimo_jax.serving.requests import Logprob
from mimo_jax.tokenizer import Tokenizer

LEAST = -9999.0  # in place of minus infinity, which JSON has not


class Spelling:
    """Which bytes each token stands for, in a byte-level vocabulary; special tokens stand for their names."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._added = {id: token.content for id, token in self._backend.get_added_tokens_decoder().items()}

    def bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        spelled = self._backend.id_to_token(token) or ""
        return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in spelled)

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode(errors="replace")

    def name_of(self, token: int) -> str:
        """The text, or the bytes where they are no text by themselves: different tokens have different names."""
        spelled = self.bytes_of(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes with: printable ones are themselves, the others follow."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _letters()


def chat_rows(spelling: Spelling, rows: Sequence[Logprob]) -> dict[str, Any]:
    """A row for each token, with the most likely ones in its place."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        spelled = list(spelling.bytes_of(token))
        return {"token": spelling.text_of(token), "logprob": max(logprob, LEAST), "bytes": spelled}

    content = [
        {**entry(row.token, row.logprob), "top_logprobs": [entry(token, value) for token, value in row.top]}
        for row in rows
    ]
    return {"content": content, "refusal": None}


class CompletionRows:
    """The arrays of /v1/completions; where a token's text begins is counted from piece to piece."""

    def __init__(self, spelling: Spelling, offset: int) -> None:
        self._spelling, self._offset = spelling, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, rows: Sequence[Logprob]) -> dict[str, Any]:
        name_of = self._spelling.name_of
        return {
            "tokens": [name_of(row.token) for row in rows],
            "token_logprobs": [max(row.logprob, LEAST) for row in rows],
            "top_logprobs": [{name_of(token): max(value, LEAST) for token, value in row.top} for row in rows],
            "text_offset": [self._place(row.token) for row in rows],
        }

    def _place(self, token: int) -> int:
        begin = self._offset
        self._offset += len(self._decoder.decode(self._spelling.bytes_of(token)))
        return begin
