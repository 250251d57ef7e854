"""Whose turn it is: what each account may ask for, and in which order accounts are served. No HTTP.

Nothing here locks: one thread calls it, or all who do hold the same lock.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Literal, TypeVar

from mimo_jax.errors import UserError
from mimo_jax.serving.requests import Usage

Item = TypeVar("Item")


class AccountLimit(UserError):
    """This account has to wait, `retry_after` seconds at least; others need not."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class AccountRules:
    """None: no such limit. Without a limit on sessions there are none."""

    entries: int | None = None  # of an account, queued or running
    sessions: int | None = None  # at once
    session_seconds: float = 30 * 60.0  # then a session ends as soon as another account waits for one
    idle_seconds: float = 5 * 60.0  # without an entry: then a session, or the place in line for one, is lost


@dataclasses.dataclass(frozen=True)
class Standing:
    """Of an account. `position` counts from 1 while it waits; `reason` says why its last session ended."""

    phase: Literal["new", "waiting", "active", "released"]
    position: int | None = None
    reason: Literal["idle", "cap", "closed"] | None = None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Those of the prompts, how many of them were cached, and those generated."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0

    @classmethod
    def of(cls, samples: Sequence[Usage]) -> Tokens:
        """Of one request, whose prompt is read once for all of its samples."""
        if not samples:
            return cls()
        return cls(samples[0].prompt_tokens, samples[0].cached_tokens, sum(one.generated_tokens for one in samples))

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.cached + other.cached, self.generated + other.generated)


class Accounts:
    """Admission by account: at most so many entries each and, where there are sessions, only in one's own.

    Who asks for a session and finds none free waits in line, and is in it the next time its turn has come. Whoever has
    a session keeps it, even beyond its end, while nobody waits; entries under way outlive it.
    """

    def __init__(self, rules: AccountRules, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules, self._clock = rules, clock
        self._entries, self._usage = defaultdict[str, int](int), defaultdict[str, Tokens](Tokens)
        self._line = dict[str, None]()  # in order
        self._sessions = dict[str, float]()  # since when, the oldest first
        self._seen = dict[str, float]()  # when those in line or in a session last entered, left or asked
        self._ended = dict[str, Literal["idle", "cap", "closed"]]()

    def enter(self, account: str) -> None:
        """One more entry; raises `AccountLimit` if it has too many, or has to wait for a session."""
        self._settle()
        if self._rules.entries is not None and self._entries[account] >= self._rules.entries:
            raise AccountLimit(f"account {account!r}: at most {self._rules.entries} requests may be queued", 1.0)
        if self._rules.sessions is not None:
            self._ask_for_session(account)
        self._entries[account] += 1

    def leave(self, account: str, *samples: Usage) -> None:
        """An entry has ended, with what its samples took."""
        self._entries[account] -= 1
        self._usage[account] += Tokens.of(samples)
        self._seen[account] = self._clock()

    def close(self, account: str) -> None:
        """It gives up its session, or its place in line."""
        self._release(account, "closed")
        self._settle()

    def state(self, account: str) -> Standing:
        self._settle()
        if account in self._line:
            return Standing("waiting", position=self._place(account))
        if account in self._sessions or self._rules.sessions is None:
            return Standing("active")
        reason = self._ended.get(account)
        return Standing("released" if reason else "new", reason=reason)

    def usage(self, account: str) -> Tokens:
        return self._usage[account]

    def _ask_for_session(self, account: str) -> None:
        self._seen[account] = now = self._clock()
        if account not in self._sessions:
            self._line.setdefault(account)
            self._settle()
        if account not in self._sessions:
            until = next(iter(self._sessions.values())) + self._rules.session_seconds
            # Asking again in time keeps the place.
            wait = max(1.0, min(until - now, self._rules.idle_seconds / 2))
            raise AccountLimit(f"account {account!r}: no session is free, place {self._place(account)} in line", wait)

    def _place(self, account: str) -> int:
        return [*self._line].index(account) + 1

    def _settle(self) -> None:
        """Ends sessions and lets those who wait have them."""
        if self._rules.sessions is None:
            return
        now = self._clock()
        for account in (*self._sessions, *self._line):
            if not self._entries[account] and now - self._seen[account] >= self._rules.idle_seconds:
                self._release(account, "idle")
        while self._line:
            if len(self._sessions) >= self._rules.sessions:
                oldest, since = next(iter(self._sessions.items()))
                if now - since < self._rules.session_seconds:
                    return
                self._release(oldest, "cap")
            first = next(iter(self._line))
            del self._line[first]
            self._sessions[first] = self._seen[first] = now

    def _release(self, account: str, reason: Literal["idle", "cap", "closed"]) -> None:
        if account in self._sessions or account in self._line:
            self._sessions.pop(account, None)
            self._line.pop(account, None)
            self._ended[account] = reason


class FairOrder(Generic[Item]):
    """A queue by account, after the virtual token counter (arXiv 2401.00588).

    Next is the account that was served the least tokens so far, and of it the item that came first. While two accounts
    wait, what they are served differs by a bounded number of tokens, however many items either has. An account that
    was away gains nothing by it. Whoever takes an item charges what it costs: its prompt at once, or the same account
    is next again.
    """

    def __init__(self) -> None:
        self._queues = dict[str, deque[tuple[int, Item]]]()  # none is empty
        self._served = defaultdict[str, float](float)
        self._last = ""  # account whose queue became empty last
        self._arrivals = itertools.count()

    def push(self, account: str, item: Item) -> None:
        if account not in self._queues:
            least = min((self._served[other] for other in self._queues), default=self._served[self._last])
            self._served[account] = max(self._served[account], least)
            self._queues[account] = deque()
        self._queues[account].append((next(self._arrivals), item))

    def pop(self) -> Item:
        """The next item; IndexError if there is none."""
        if not self._queues:
            raise IndexError("pop from an empty FairOrder")
        account = min(self._queues, key=lambda account: (self._served[account], self._queues[account][0][0]))
        return self._take(account, 0)

    def charge(self, account: str, tokens: float) -> None:
        """It was served `tokens`, weighted by what they cost."""
        self._served[account] += tokens

    def remove(self, item: Item) -> None:
        """The item itself, not one that equals it; ValueError if it is not there."""
        for account, queue in self._queues.items():
            for place, (_, found) in enumerate(queue):
                if found is item:
                    self._take(account, place)
                    return
        raise ValueError("the item is not in the queue")

    def _take(self, account: str, place: int) -> Item:
        queue = self._queues[account]
        _, item = queue[place]
        del queue[place]
        if not queue:
            del self._queues[account]
            self._last = account
        return item

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Item]:
        """In the order of arrival."""
        return (item for _, item in sorted(itertools.chain(*self._queues.values()), key=lambda entry: entry[0]))
