"""Connections of which nothing comes: those that send too little, and those that take nothing."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest

from mimo_jax.serving.http import server as module
from mimo_jax.serving.http.server import Server, listen
from tests.serving.http.scripted import ScriptedEngine, make_service, wait_until

SECONDS = 0.3  # for headers
MUCH = b"x" * (8 << 20)  # for any buffer
ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SEND = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"


async def app(scope, receive, send):
    """Takes longer over a GET than headers may take; refuses a POST, of which it reads nothing."""
    is_refused = scope["method"] == "POST"
    await send({"type": "http.response.start", "status": 413 if is_refused else 200})
    await asyncio.sleep(0 if is_refused else 2 * SECONDS)
    body = b"no" if is_refused else MUCH if scope["path"] == "/much" else b"yes"
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def serving():
    """The server and its port."""
    listener = listen("127.0.0.1", 0)
    server = Server(app, make_service(ScriptedEngine()), grace=0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def said(connection) -> bytes:
    """Up to the end of the connection."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.mark.parametrize("sent", [b"", ASK[:-2]])
def test_headers_that_never_end(sent, monkeypatch):
    """The connection is closed, also where there was a request before, which may take longer."""
    monkeypatch.setattr(module, "HEADER_SECONDS", SECONDS)
    with serving() as (_, port), connect(port) as connection, connect(port) as used:
        connection.sendall(sent)
        used.sendall(ASK)
        assert said(connection) == b""
        while b"yes" not in used.recv(1000):
            pass
        used.sendall(ASK[:-2])
        assert b"yes" not in said(used)


def test_letters_now_and_then_are_no_headers(monkeypatch):
    """Nor are they the body of a request that was refused: both end."""
    monkeypatch.setattr(module, "HEADER_SECONDS", SECONDS)
    for begin in (ASK[:-2] + b"X-Long: ", SEND):
        with serving() as (_, port), connect(port) as connection:
            connection.sendall(begin)
            with pytest.raises(OSError):
                for _ in range(900):
                    connection.sendall(b"x")
                    time.sleep(0.01)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such limit")
def test_who_takes_nothing_is_cut_off(monkeypatch):
    """Though the app has said everything: what is left would lie here as long as the client likes."""
    monkeypatch.setattr(module, "TAKE_SECONDS", 1)
    with serving() as (server, port), connect(port) as connection:
        connection.sendall(ASK.replace(b"/", b"/much", 1))
        wait_until(lambda: server.server_state.total_requests == 1)
        wait_until(lambda: not server.server_state.connections)
        with pytest.raises(ConnectionResetError):
            said(connection)
