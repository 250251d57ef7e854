"""From token ids to text as it grows: where it ends, and how much of it is settled."""

from __future__ import annotations

from collections.abc import Sequence

from mimo_jax.tokenizer import Tokenizer


class Transcript:
    """One row's text: that of its tokens, up to a stop token or stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop_ids, self._stop = tokenizer, stop_ids, stop
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
        self._is_ended = bool(tokens) and tokens[-1] in self._stop_ids
        self.text = self._tokenizer.decode(tokens[:-1] if self._is_ended else tokens)
        places = [place for word in self._stop if (place := self.text.find(word)) >= 0]
        if places:
            self.text, self.is_cut = self.text[: min(places)], True

    @property
    def settled(self) -> str:
        """The text without an end that later tokens may still change: half a character, the start of a stop string."""
        text = self.text.rstrip("\ufffd")
        for word in self._stop:
            for size in range(min(len(word) - 1, len(text)), 0, -1):
                if text.endswith(word[:size]):
                    text = text[:-size]
                    break
        return text
