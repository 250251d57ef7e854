"""A turn: what a body asks of the engine, and how what comes back is read. Routes make them and format their events."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from mimo_jax.serving.dialect import Parser, Part, Piece
from mimo_jax.serving.http.errors import internal, overloaded, timeout
from mimo_jax.serving.http.inbox import Inbox
from mimo_jax.serving.http.record import Record
from mimo_jax.serving.reply import Reply
from mimo_jax.serving.requests import Logprob, TokenRequest, Update, Usage

if TYPE_CHECKING:
    from mimo_jax.serving.http.service import Service

MOST_UNREAD = 1024  # updates of a choice, half a minute's: a client that leaves more is dropped
_ENDS = {"stop": "stop", "length": "length", "deadline": "length"}


@dataclasses.dataclass(frozen=True)
class Turn:
    request: TokenRequest
    stop: tuple[str, ...] = ()
    thinking: bool = False  # as the prompt leaves it
    parser: Callable[[], Parser] | None = None  # makes one for each choice; None: the text is the answer as it is


@dataclasses.dataclass(frozen=True)
class Event:
    """What a choice has gained."""

    choice: int
    pieces: list[Piece]
    rows: list[Logprob]  # of tokens after thinking
    finish: str | None = None  # stop, length, tool_calls: the choice's last event


class Run:
    """Turns under way; choice i is sample i % n of turn i // n.

    It is iterated once, and whoever stops before its end cancels it.
    """

    def __init__(self, service: Service, turns: Sequence[Turn]) -> None:
        self._service, self.turns = service, turns
        self.samples = turns[0].request.samples
        owners = [turn for turn in turns for _ in range(self.samples)]
        self.choices = [Choice(service, turn, index) for index, turn in enumerate(owners)]
        self._inbox = Inbox[tuple[int, Update]](MOST_UNREAD * len(self.choices))
        self._tickets: list[int] = []

    @classmethod
    async def start(cls, service: Service, turns: Sequence[Turn]) -> Run:
        """Submits them; raises what the engine refuses them with."""
        run = cls(service, turns)
        try:
            await run_in_threadpool(run._submit)
        except BaseException:
            run.cancel()
            raise
        return run

    def _submit(self) -> None:
        for number, turn in enumerate(self.turns):
            record = Record(self._service.metrics, turn.request)
            sink = functools.partial(self._receive, record, number * self.samples)
            self._tickets.append(self._service.engine.submit(turn.request, sink))

    def _receive(self, record: Record, first: int, update: Update) -> None:
        """Called by the engine's thread."""
        record.add(update)
        self._inbox.put((first + update.sample, update))

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Every choice's events, up to the last one's `finish` and the engine's word that nothing goes on."""
        while not all(choice.is_over for choice in self.choices):
            for index, update in await self._inbox.take():
                choice = self.choices[index]
                event = choice.take(update)
                if event and event.finish and not choice.is_over:
                    self._service.engine.cancel(self._tickets[index // self.samples], index % self.samples)
                if event:
                    yield event

    def cancel(self) -> None:
        """Ends what still goes on; of no effect after the end."""
        for number, ticket in enumerate(self._tickets):
            choices = self.choices[number * self.samples :][: self.samples]
            if not all(choice.is_over for choice in choices):
                self._service.engine.cancel(ticket)

    async def overflowed(self) -> None:
        """Waits until the reader is too far behind."""
        await self._inbox.overflowed.wait()


class Choice:
    """One text as it grows."""

    def __init__(self, service: Service, turn: Turn, index: int) -> None:
        self._index, self._stop_ids = index, turn.request.stop_ids or ()
        self._reply = Reply(service.tokenizer, self._stop_ids, turn.stop, turn.parser() if turn.parser else None)
        self.finish: str | None = None  # of the text
        self.is_over = False  # for the engine, too
        self.usage: Usage | None = None  # of the engine, which may have gone on for a while
        self.used = 0  # tokens that the text takes
        self._is_thinking, self._ends = turn.thinking, service.thinking_ends
        self._begin = service.thinking_begin if turn.parser else None
        self._reasoning_tokens = 0
        self._rows = deque[tuple[int, Logprob]]()  # with their tokens' places, not yet shown
        self._count = 0
        self._has_calls = False
        # A stop string may begin so many tokens ago, and rows go no further than the text.
        self._held = max((len(word.encode()) for word in turn.stop), default=0)

    def take(self, update: Update) -> Event | None:
        self.is_over, self.usage = update.finish is not None, update.usage
        if self.finish:  # the engine goes on until it hears of it
            return None
        if update.finish not in (None, *_ENDS):
            raise overloaded("the server is closing") if update.finish == "cancelled" else internal("the engine failed")
        if update.finish == "deadline" and not (self._count or update.tokens):
            raise timeout("the time was up before the first token")
        self._read(update)
        self.used = self._count
        pieces = self._reply.update(update.tokens)
        self.finish = "stop" if self._reply.is_over else _ENDS.get(update.finish or "")
        if self.finish:
            pieces += self._reply.close(self.finish == "length")
            self.used = self._reply.used
        self._has_calls = self._has_calls or any(piece.part == Part.NAME for piece in pieces)
        if self._has_calls and self.finish == "stop" and not self._reply.is_stopped:  # a string may have cut a call
            self.finish = "tool_calls"
        rows = self._settled_rows()
        return Event(self._index, _merged(pieces), rows, self.finish) if pieces or rows or self.finish else None

    @property
    def stop_string(self) -> str | None:
        """The one that ended the text."""
        return self._reply.stop_string

    @property
    def reasoning_tokens(self) -> int:
        return min(self._reasoning_tokens, self.used)

    def _read(self, update: Update) -> None:
        """Takes note of the tokens, one by one."""
        for place, token in enumerate(update.tokens):
            if self._count == 0 and token == self._begin:
                self._is_thinking = True
            if self._is_thinking:
                self._reasoning_tokens += 1
                self._is_thinking = token not in self._ends
            elif update.logprobs and token not in self._stop_ids:
                self._rows.append((self._count, update.logprobs[place]))
            self._count += 1

    def _settled_rows(self) -> list[Logprob]:
        """Those not yet shown, as far as the text goes for certain."""
        end = self.used if self.finish else self._count - self._held
        rows = []
        while self._rows and self._rows[0][0] < end:
            rows.append(self._rows.popleft()[1])
        return rows


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours that belong to the same are one."""
    groups = itertools.groupby(pieces, lambda piece: (piece.part, piece.call))
    return [Piece(part, "".join(piece.text for piece in group), call) for (part, call), group in groups]
