"""The way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """From any thread, which never waits, to one reader on the loop that this was made on.

    It takes `most` things that nobody has read; what comes then is dropped, and `overflowed` set.
    """

    def __init__(self, most: int) -> None:
        self._most, self._things = most, deque[T]()
        self._loop, self._has_some = asyncio.get_running_loop(), asyncio.Event()
        self.overflowed = asyncio.Event()

    def put(self, thing: T) -> None:
        is_full = len(self._things) >= self._most
        if not is_full:
            self._things.append(thing)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody will read
            self._loop.call_soon_threadsafe((self.overflowed if is_full else self._has_some).set)

    async def take(self) -> list[T]:
        """All there is, in its order, and at least one."""
        await self._has_some.wait()
        self._has_some.clear()
        return [self._things.popleft() for _ in range(len(self._things))]
