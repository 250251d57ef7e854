"""The rows that decode together: texts take a slot of the running state, and leave it, between visits of the host.

Nothing a row draws depends on its slot or on its neighbours.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.decode import loop
from mimo_jax.decode.controls import Adjustments, Controls, Logprobs, empty_logprobs, stops_of
from mimo_jax.decode.loop import Counters, State
from mimo_jax.decode.sampling import Greedy, Strategy, columns_of
from mimo_jax.generation import Acceptance
from mimo_jax.loading import Model
from mimo_jax.serving import rows
from mimo_jax.serving.reader import Reader
from mimo_jax.serving.requests import MOST_SEED, MOST_TOP_LOGPROBS, Finish, Logprob, Matcher, TokenRequest

ALL = np.uint32(0xFFFFFFFF)
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Text:
    """One sample of a request, and what it has so far."""

    request: TokenRequest
    sample: int
    limit: int
    strategy: Strategy
    stop_ids: tuple[int, ...]
    matcher: Matcher | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    matched: int = 0  # how many of its tokens the matcher has seen
    is_broken: bool = False  # its matcher has failed
    acceptance: Acceptance = dataclasses.field(default_factory=lambda: Acceptance(0, 0, [], []))

    @property
    def is_adjusted(self) -> bool:
        request = self.request
        return bool(request.presence_penalty or request.frequency_penalty or request.logit_bias)


@dataclasses.dataclass(frozen=True)
class News:
    """What a visit brought to a text."""

    text: Text
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish: Finish | None


class Slots:
    """`count` rows of at most `capacity` tokens."""

    def __init__(self, model: Model, count: int, capacity: int) -> None:
        self.decoder, self.weights, self.capacity = model.decoder, model.weights, capacity
        self.vocab_size = model.config.vocab_size
        self.axes = rows.axes_of(self.decoder, capacity)
        rows.check_slots(self.axes, count)
        self.texts: list[Text | None] = [None] * count
        self._controls = self._controls_of(self.texts)
        caches, keys = loop.empty_caches(self.decoder, count, capacity), loop.row_keys([0] * count)
        self._state = loop.start(self.decoder, *caches, np.zeros(count, np.int32), keys, self._controls)

    @property
    def has_room(self) -> bool:
        return None in self.texts

    @property
    def running(self) -> list[Text]:
        return [text for text in self.texts if text is not None]

    def enter(self, reader: Reader, text: Text) -> None:
        """Takes a free slot; the first token is there at the next `news`."""
        slot = self.texts.index(None)
        self.texts[slot] = text
        most = MOST_TOP_LOGPROBS if any(text.request.top_logprobs is not None for text in self.running) else None
        self._record(most)
        masks = None
        if text.matcher is not None:
            masks = self._masks([text], np.zeros((1, 0), np.int32))[:, 0]
        seed = (text.request.seed + text.sample) % (MOST_SEED + 1)
        row = reader.start(seed, text.limit, self._controls_of([text]), masks, most)
        self._state = rows.insert(self.axes, self._state, row, slot)
        self._controls = self._controls_of(self.texts)

    def leave(self, text: Text) -> None:
        """Its slot is free, whether it has ended or not."""
        slot = self.texts.index(text)
        self.texts[slot] = None
        self._state = _ended(self._state, np.int32(slot))
        if all(text.request.top_logprobs is None for text in self.running):
            self._record(None)
        self._controls = self._controls_of(self.texts)

    def caches_of(self, text: Text) -> rows.Caches:
        """What its row has read: the prompt, and all of its tokens but the newest."""
        assert self.axes is not None
        return rows.take(self.axes, self._state, np.int32(self.texts.index(text)))

    def visit(self, rounds: int, is_eager: bool) -> None:
        """Up to `rounds` rounds of every row; if it `is_eager`, until one has ended."""
        is_matched = np.array([text is not None and text.matcher is not None for text in self.texts])
        if any(text.matcher is None for text in self.running):
            arguments = self.decoder, self.weights, self._state, self._controls
            self._state = loop.decode(*arguments, rounds, is_matched, is_eager)
        for _ in range(rounds if is_matched.any() else 0):
            if not self._masked_round(~is_matched):
                return

    def news(self) -> list[News]:
        """What is new of every text since it was asked for last."""
        counts, is_done, counters = jax.device_get((self._state.counts, self._state.is_done, self._state.counters))
        sent = np.array([len(text.tokens) if text else 0 for text in self.texts], np.int32)
        fresh = np.where([text is not None for text in self.texts], counts - sent, 0)
        width = 1 << max(int(fresh.max()) - 1, 0).bit_length()
        tokens, logprobs = jax.device_get(_since(self._state, sent, width))
        found = []
        for slot, text in enumerate(self.texts):
            if text is not None and (fresh[slot] or text.is_broken):
                new = tokens[slot, : fresh[slot]].tolist()
                text.tokens += new
                text.acceptance = _acceptance(counters, slot, len(text.tokens))
                shown = _logprobs_of(text, new, logprobs, slot)
                found.append(News(text, tuple(new), shown, _finish_of(text, bool(is_done[slot]))))
        return found

    def _masked_round(self, held: np.ndarray) -> bool:
        """A round that stops between its draft and its verification, for grammars to see the draft."""
        arguments = (self.decoder, self.weights, self._state, self._controls)
        draft = loop.propose(*arguments)
        drafts, output, counts, is_done = jax.device_get(
            (draft.tokens, self._state.output, self._state.counts, self._state.is_done)
        )
        held = held | [text is not None and text.is_broken for text in self.texts]
        unfinished = [None if held[slot] or is_done[slot] else text for slot, text in enumerate(self.texts)]
        if not any(unfinished):
            return False
        for text, tokens, count in zip(unfinished, output, counts):
            if text is not None and text.matcher is not None:
                _trying(text, text.matcher.commit, tokens[text.matched : count].tolist())
                text.matched = int(count)
        self._state = loop.commit(*arguments, draft, self._masks(unfinished, drafts), held)
        return True

    def _masks(self, texts: Sequence[Text | None], drafts_BM: np.ndarray) -> np.ndarray:
        batch, count = drafts_BM.shape
        masks = np.full((batch, count + 1, -(-self.vocab_size // 32)), ALL)
        for text, drafts, mask in zip(texts, drafts_BM, masks):
            if text is not None and text.matcher is not None:
                _trying(text, text.matcher.masks, drafts.tolist(), mask)
        return masks

    def _record(self, most: int | None) -> None:
        """Keeps logarithms from now on, or no longer."""
        if (most is None) != (self._state.logprobs is None):
            held = None if most is None else empty_logprobs(len(self.texts), self.capacity, most)
            self._state = dataclasses.replace(self._state, logprobs=held)

    def _controls_of(self, texts: Sequence[Text | None]) -> Controls:
        strategy = columns_of([text.strategy if text else Greedy() for text in texts])
        stops = stops_of([text.stop_ids if text else () for text in texts])
        if not any(text is not None and text.is_adjusted for text in texts):
            return Controls(strategy, stops)
        bias = np.zeros((len(texts), self.vocab_size), np.float32)
        for row, text in zip(bias, texts):
            for token, value in (text.request.logit_bias if text else {}).items():
                row[token] = value
        requests = [text.request if text else None for text in texts]
        presence, frequency = (
            np.array([getattr(request, name, 0.0) for request in requests], np.float32)
            for name in ("presence_penalty", "frequency_penalty")
        )
        return Controls(strategy, stops, Adjustments(jnp.asarray(bias), presence, frequency))


def _acceptance(counters: Counters, slot: int, tokens: int) -> Acceptance:
    """How drafting has gone for a row. Its first token came with the prefill."""
    return Acceptance(
        int(counters.rounds[slot]), tokens - 1, counters.tested[slot].tolist(), counters.accepted[slot].tolist()
    )


def _finish_of(text: Text, is_done: bool) -> Finish | None:
    if text.is_broken:
        return "error"
    if not is_done:
        return None
    return "stop" if text.tokens[-1] in text.stop_ids else "length"


def _trying(text: Text, call: Callable[..., None], *arguments: Any) -> None:
    """A matcher that fails is no reason for others' texts to end."""
    try:
        call(*arguments)
    except Exception:
        _LOG.exception("a matcher has failed; its text ends")
        text.is_broken = True


@partial(jax.jit, donate_argnames="state")
def _ended(state: State, slot: jax.Array) -> State:
    return dataclasses.replace(state, is_done=state.is_done.at[slot].set(True))


@partial(jax.jit, static_argnames="width")
def _since(state: State, sent_B: jax.Array, width: int) -> tuple[jax.Array, Logprobs | None]:
    """`width` columns of each row's tokens and logarithms from column `sent_B` on, its end and what lies beyond."""
    column_BW = sent_B[:, None] + jnp.arange(width)

    def columns(held: jax.Array) -> jax.Array:
        index = column_BW.reshape(column_BW.shape + (1,) * (held.ndim - 2))
        return jnp.take_along_axis(held, index, axis=1, mode="clip")

    return columns(state.output), jax.tree.map(columns, state.logprobs)


def _logprobs_of(text: Text, tokens: list[int], logprobs: Logprobs | None, slot: int) -> tuple[Logprob, ...]:
    most = text.request.top_logprobs
    if most is None or logprobs is None:
        return ()
    own, top, ids = (getattr(logprobs, name)[slot] for name in ("own_BS", "top_BSK", "top_ids_BSK"))
    return tuple(
        Logprob(token, float(own[place]), tuple(zip(ids[place, :most].tolist(), top[place, :most].tolist())))
        for place, token in enumerate(tokens)
    )
