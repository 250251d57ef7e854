"""Server-sent events: a reply in pieces, for a client that may stop reading, or leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mimo_jax.serving.http.disconnect import gone, race
from mimo_jax.serving.http.errors import from_exception
from mimo_jax.serving.http.turn import Run

PING, PING_SECONDS = b": ping\n\n", 15.0  # proxies close what is silent
WRITE_SECONDS = 30.0  # a client that takes nothing for so long is dropped
DONE = b"data: [DONE]\n\n"


def message(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def event(body: dict[str, Any]) -> bytes:
    """A message that says its type twice, as two of the APIs have it."""
    return f"event: {body['type']}\n".encode() + message(body)


class EventStream(Response):
    """Sends `messages` as they come. An error among them becomes the last one.

    A client that leaves, or reads too slowly, gets no more, and `run` is cancelled.
    """

    media_type = "text/event-stream"

    def __init__(self, messages: AsyncIterator[bytes], run: Run) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._messages, self._run = messages, run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(OSError):  # it is gone, or its time is up
                await race(self._write(send), self._ping(send), gone(receive), self._run.overflowed())
        finally:
            self._run.cancel()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._messages_to_the_end()) as messages:
            async for one in messages:
                async with asyncio.timeout(WRITE_SECONDS):
                    await send({"type": "http.response.body", "body": one, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _messages_to_the_end(self) -> AsyncGenerator[bytes, None]:
        try:
            async for one in self._messages:
                yield one
        except Exception as error:
            yield message(from_exception(error).body())

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            await send({"type": "http.response.body", "body": PING, "more_body": True})
