"""The process around the app: how it listens, and how it ends."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mimo_jax.serving.http.service import Service

FLUSH_SECONDS = 5  # for replies that are complete, until connections are cut
HEADER_SECONDS = 10.0  # until a request's headers are here
TAKE_SECONDS = 30  # a client that takes nothing for so long is cut off, whatever is left for it


class Server(uvicorn.Server):
    """Serves until a signal comes. Then it takes no more work, says so to who asks for its health, and gives what is
    under way `grace` seconds. A second signal ends that.
    """

    def __init__(self, app: ASGIApp, service: Service, grace: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self._service, self._grace = service, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.is_draining:
            return super().handle_exit(sig, frame)
        self._service.is_draining = True
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self._service.engine.close(self._grace)
        self.should_exit = True


class Connection(H11Protocol):
    """Ends when a request does not get so far that it is handed on, and when the rest of one that was answered already
    does not end. uvicorn waits for both without end.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # asyncio's or uvloop's
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError where that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * TAKE_SECONDS)
    return listener
