"""From token ids to text as it grows: where it ends, and how much of it is settled."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from mimo_jax.tokenizer import Tokenizer

_PARTIAL = "\ufffd"  # shows where a character is not complete


class Transcript:
    """One row's text: that of its tokens, up to a stop token or the first stop string.

    Only new tokens are decoded, together with the stretch before them: how a token is spelled may depend on that.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop_ids, self._stop = tokenizer, stop_ids, stop
        self._tokens: list[int] = []
        self._anchor, self._decoded = 0, 0  # tokens before the stretch decoded last, and up to its end
        self._standing = ""  # the text of the tokens decoded
        self._is_ended = False  # by a token
        self.is_cut = False  # by a string
        self.text = ""

    @property
    def is_stopped(self) -> bool:
        return self.is_cut or self._is_ended

    def update(self, tokens: list[int]) -> None:
        """Takes the row's tokens, all of them so far."""
        if self.is_cut:
            return
        self._tokens, self._is_ended = tokens, bool(tokens) and tokens[-1] in self._stop_ids
        spelled = tokens[:-1] if self._is_ended else tokens
        before = self._tokenizer.decode(spelled[self._anchor : self._decoded])
        new = self._tokenizer.decode(spelled[self._anchor :])[len(before) :]
        self._find_stop(self._standing + new)
        if len(spelled) > self._decoded and not new.endswith(_PARTIAL):
            self._anchor, self._decoded, self._standing = self._decoded, len(spelled), self._standing + new

    def _find_stop(self, text: str) -> None:
        first = max(0, len(self._standing) - max(map(len, self._stop), default=0))
        places = [place for word in self._stop if (place := text.find(word, first)) >= 0]
        self.is_cut = bool(places)
        self.text = text[: min(places)] if places else text

    @property
    def settled(self) -> str:
        """The text without an end that later tokens may still change: half a character, the start of a stop string."""
        if self.is_stopped:
            return self.text
        text = self.text.rstrip(_PARTIAL)
        held = (size for word in self._stop for size in range(len(word) - 1, 0, -1) if text.endswith(word[:size]))
        return text[: len(text) - max(held, default=0)]

    @property
    def used(self) -> int:
        """How many of the row's tokens the text takes, the one in which a stop string begins included."""
        return self._first(lambda spelled: spelled.startswith(self.text)) if self.is_cut else len(self._tokens)

    @property
    def tokens(self) -> list[int]:
        """Ids that spell the text: the row's own; where a stop string begins inside a token, its first part anew."""
        if not self.is_cut:
            return self._tokens
        before = self._tokens[: self._first(lambda spelled: not self.text.startswith(spelled)) - 1]
        rest = self.text[len(self._tokenizer.decode(before)) :]
        return before + self._tokenizer.encode(rest, literal=True)

    def _first(self, holds: Callable[[str], bool]) -> int:
        """The least number of tokens for whose text something holds, which then holds for more, too."""
        counts = range(len(self._tokens) + 1)
        return bisect.bisect_left(counts, True, key=lambda count: holds(self._tokenizer.decode(self._tokens[:count])))
