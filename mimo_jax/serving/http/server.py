"""The process around the app: how it listens, and how it ends."""

from __future__ import annotations

import socket
import threading
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from mimo_jax.serving.http.service import Service

FLUSH_SECONDS = 5  # for replies that are complete, until connections are cut


class Server(uvicorn.Server):
    """Serves until a signal comes. Then it takes no more work, says so to who asks for its health, and gives what is
    under way `grace` seconds. A second signal ends that.
    """

    def __init__(self, app: ASGIApp, service: Service, grace: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
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


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError where that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)
