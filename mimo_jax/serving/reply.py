"""From new token ids to the parts of an answer, as they settle."""

from __future__ import annotations

from collections.abc import Sequence

from mimo_jax.serving.dialect import CALL, CLOSE, END_CALL, OPEN, Parser, Part, Piece
from mimo_jax.text import Transcript
from mimo_jax.tokenizer import Tokenizer

_TAGS = (OPEN, CLOSE, CALL, END_CALL)  # which are special tokens of some tokenizers; a parser must see them


class Reply:
    """One sample's answer. `update` and `close` return the pieces that are certain by then.

    Without a parser all of its text is ANSWER, and that of special tokens is none.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_ids: Sequence[int], stop: Sequence[str] = (), parser: Parser | None = None
    ) -> None:
        added = tokenizer.added_tokens
        visible = frozenset(added[tag] for tag in _TAGS if parser and tag in added)
        self._transcript, self._parser = Transcript(tokenizer, stop_ids, stop, visible), parser
        self._tokens: list[int] = []

    @property
    def stop_string(self) -> str | None:
        """The one that was found: it, and what comes after it, is no part of the answer."""
        return self._transcript.stop_string

    @property
    def is_stopped(self) -> bool:
        return self.stop_string is not None

    @property
    def is_over(self) -> bool:
        """Nothing that comes after this is part of the answer."""
        return self.is_stopped or bool(self._parser and self._parser.is_over)

    @property
    def used(self) -> int:
        """How many tokens the answer takes, the one in which a stop string begins included."""
        return self._transcript.used

    def update(self, tokens: Sequence[int]) -> list[Piece]:
        """Takes the newest tokens."""
        self._tokens += tokens
        self._transcript.update(self._tokens)
        return self._pieces(self._transcript.take())

    def close(self, is_cut: bool = False) -> list[Piece]:
        """The answer has ended, or a limit has cut it; a stop string cuts it, too, where it stands in a call."""
        pieces = self._pieces(self._transcript.take(is_end=True))
        return pieces + (self._parser.close(is_cut or self.is_stopped) if self._parser else [])

    def _pieces(self, text: str) -> list[Piece]:
        if self._parser:
            return self._parser.feed(text)
        return [Piece(Part.ANSWER, text)] if text else []
