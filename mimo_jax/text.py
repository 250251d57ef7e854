"""From token ids to text as it grows: where it ends, and how much of it is settled."""

from __future__ import annotations

import bisect
import io
from collections.abc import Callable, Collection, Sequence

from mimo_jax.tokenizer import Tokenizer

_PARTIAL = "\ufffd"  # shows where a character is not complete


class Transcript:
    """One row's text: that of its tokens, up to a stop token or the first stop string.

    Only new tokens are decoded, together with the stretch before them: how a token is spelled may depend on that.
    Special tokens are no text, but for those that are `visible`.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_ids: Sequence[int], stop: Sequence[str], visible: Collection[int] = ()
    ) -> None:
        self._tokenizer, self._stop_ids, self._stop, self._visible = tokenizer, stop_ids, stop, visible
        self._longest = max(map(len, stop), default=0)
        self._tokens: list[int] = []
        self._anchor, self._decoded = 0, 0  # tokens before the stretch decoded last, and up to its end
        self._written = io.StringIO()  # the text, which grows without being copied
        self._complete = 0  # characters of it that the tokens decoded spell
        self._taken = 0  # characters
        self._is_ended = False  # by a token
        self.stop_string: str | None = None  # the one that was found

    @property
    def text(self) -> str:
        return self._from(0)

    @property
    def is_cut(self) -> bool:
        """By a stop string."""
        return self.stop_string is not None

    @property
    def is_stopped(self) -> bool:
        return self.is_cut or self._is_ended

    def update(self, tokens: list[int]) -> None:
        """Takes the row's tokens, all of them so far."""
        if self.is_cut:
            return
        self._tokens, self._is_ended = tokens, bool(tokens) and tokens[-1] in self._stop_ids
        spelled = tokens[:-1] if self._is_ended else tokens
        before = self._decode(spelled[self._anchor : self._decoded])
        new = self._decode(spelled[self._anchor :])[len(before) :]
        self._cut_at(self._complete)
        self._written.write(new)
        self._find_stop()
        if len(spelled) > self._decoded and not new.endswith(_PARTIAL):
            self._anchor, self._decoded = self._decoded, len(spelled)
            self._complete += len(new)

    def _find_stop(self) -> None:
        first, recent = self._recent()
        found = [(place + len(word), place, word) for word in self._stop if (place := recent.find(word)) >= 0]
        if found:  # the one that is complete first, however many tokens came at once
            _, place, self.stop_string = min(found)
            self._cut_at(first + place)

    def take(self, is_end: bool = False) -> str:
        """What has settled since the last call; at the end of the text all that is left."""
        new = self._from(self._taken)
        new = new[: len(new) - (0 if is_end else self._held())]
        self._taken += len(new)
        return new

    @property
    def settled(self) -> str:
        """The text without an end that later tokens may still change: half a character, the start of a stop string."""
        text = self.text
        return text[: len(text) - self._held()]

    def _held(self) -> int:
        """How many characters such an end has."""
        if self.is_stopped:
            return 0
        _, recent = self._recent()
        text = recent.rstrip(_PARTIAL)
        held = (size for word in self._stop for size in range(len(word) - 1, 0, -1) if text.endswith(word[:size]))
        return len(recent) - len(text) + max(held, default=0)

    def _recent(self) -> tuple[int, str]:
        """The end of the text, in which a stop string may be new or under way, and where it begins."""
        first = max(0, self._complete - self._longest)
        return first, self._from(first)

    def _from(self, place: int) -> str:
        self._written.seek(place)
        return self._written.read()

    def _cut_at(self, place: int) -> None:
        self._written.seek(place)
        self._written.truncate()

    @property
    def used(self) -> int:
        """How many of the row's tokens the text takes, the one in which a stop string begins included."""
        if not self.is_cut:
            return len(self._tokens)
        text = self.text
        return self._first(lambda spelled: spelled.startswith(text))

    @property
    def tokens(self) -> list[int]:
        """Ids that spell the text: the row's own; where a stop string begins inside a token, its first part anew."""
        if not self.is_cut:
            return self._tokens
        text = self.text
        before = self._tokens[: self._first(lambda spelled: not text.startswith(spelled)) - 1]
        rest = text[len(self._decode(before)) :]
        return before + self._tokenizer.encode(rest, literal=True)

    def _first(self, holds: Callable[[str], bool]) -> int:
        """The least number of tokens for whose text something holds, which then holds for more, too."""
        counts = range(len(self._tokens) + 1)
        return bisect.bisect_left(counts, True, key=lambda count: holds(self._decode(self._tokens[:count])))

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, self._visible)
