"""Clients that a server has to stand: they vanish, do not read, send too much or rubbish. And those that it serves.

Each takes the server, its own number and a source of randomness, and returns a word for how it went.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from tests.tools.fuzz import encode, mutate_bytes, mutate_value

KEY = "secret"
ASK_SECONDS = 300.0  # for a reply, behind all others
PROMPTS = ("def add(a, b):", "class Node:", "import os\n", "for line in open(path):")
ORDINARY = {"prompt": PROMPTS[0], "max_tokens": 48, "temperature": 0, "ignore_eos": True}
LONG = {**ORDINARY, "max_tokens": 900, "stream": True}
TOOL = {"name": "weather", "description": "Of a town", "parameters": {"type": "object", "properties": {"town": {}}}}
SAY = [{"role": "user", "content": "Say hello"}]
CHAT = {"messages": SAY, "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 2}
BODIES = (
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}}),
    ("/v1/chat/completions", {"messages": SAY, "max_tokens": 8, "tools": [{"type": "function", "function": TOOL}]}),
    ("/v1/chat/completions", {"messages": SAY, "max_tokens": 8, "response_format": {"type": "json_object"}}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 8, "logprobs": 1, "presence_penalty": 0.5, "echo": False}),
    ("/v1/responses", {"input": "Say hello", "max_output_tokens": 8, "stream": True, "text": {"verbosity": "low"}}),
    ("/v1/responses", {"input": SAY, "max_output_tokens": 8, "tools": [{"type": "function", **TOOL}]}),
    ("/v1/messages", {"messages": SAY, "max_tokens": 8, "system": "Be kind", "stop_sequences": ["x"], "stream": True}),
    (
        "/v1/messages/count_tokens",
        {"messages": SAY, "tools": [{"name": "weather", "input_schema": {"type": "object"}}]},
    ),
    ("/tokenize", {"messages": SAY}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
)


@dataclasses.dataclass(frozen=True)
class Server:
    port: int
    patience: float  # seconds for which clients hold on


# What clients send and read.


def request(path: str, body: object, *headers: str, key: str = KEY, length: int | None = None) -> bytes:
    """`length`: what the header says of it, whatever the body is, which is JSON already if it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Authorization: Bearer {key}"]
    lines += [*headers, f"Content-Length: {len(data) if length is None else length}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


@contextlib.asynccontextmanager
async def connected(server: Server):
    """A reader and a writer; at the end both are cut off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=64 << 20)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Status and body, which may be a stream."""
    head = await reader.readuntil(b"\r\n\r\n")
    if length := re.search(rb"content-length: (\d+)", head):
        body = await reader.readexactly(int(length[1]))
    else:
        body = await reader.readuntil(b"\r\n0\r\n\r\n")
    return int(head.split()[1]), body.decode()


async def ask(server: Server, sent: bytes) -> tuple[int, str]:
    async with asyncio.timeout(ASK_SECONDS), connected(server) as (reader, writer):
        writer.write(sent)
        return await answer(reader)


async def outcome(server: Server, sent: bytes) -> str:
    """The status, which is the client's fault if anybody's."""
    status, body = await ask(server, sent)
    assert status != 500 and '"server_error"' not in body and '"api_error"' not in body, (sent[:2000], body[:2000])
    return str(status)


def text_of(body: str) -> str:
    """Of a completion, streamed or not."""
    messages = re.findall(r"^data: (\{.*)$", body, re.MULTILINE) or [body]
    return "".join(json.loads(one)["choices"][0]["text"] for one in messages)


async def text(server: Server, body: dict) -> str:
    status, said = await ask(server, request("/v1/completions", body))
    assert status == 200, said
    return text_of(said)


async def vanishing(server: Server, number: int, rng: random.Random) -> str:
    """Leaves before a reply, within one, or half way through its body."""
    kind = ("at once", "in a stream", "in a reply", "in a body")[number % 4]
    sent = request("/v1/completions", {**LONG, "stream": kind == "in a stream"})
    async with connected(server) as (reader, writer):
        writer.write(sent[: -rng.randrange(1, 60)] if kind == "in a body" else sent)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0 if kind == "in a stream" else rng.uniform(0, 0.2)):
                await reader.readuntil(b"data: " if kind == "in a stream" else b"never") if kind != "at once" else None
    return kind


async def slow(server: Server, number: int, rng: random.Random) -> str:
    """Takes a byte a second, or none, through a small buffer; then what is left."""
    loop = asyncio.get_running_loop()
    with socket.socket() as taker:
        taker.setblocking(False)
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(taker, ("127.0.0.1", server.port))
        much = {"n": 4, "max_tokens": 900} if number % 50 == 49 else {"max_tokens": 160}  # for the system's buffers
        body = {"messages": SAY, **much, "logprobs": True, "top_logprobs": 20, "stream": True}
        await loop.sock_sendall(taker, request("/v1/chat/completions", {**body, "ignore_eos": True, "seed": number}))
        end, last = time.monotonic() + server.patience, b""
        try:
            while time.monotonic() < end:
                await asyncio.sleep(1)
                last = await _taken(taker, 1) if number % 2 else b""
            while heard := await _taken(taker, 1 << 16):
                last = last[-100:] + heard
        except TimeoutError:
            return "open"
        except ConnectionError:
            return "dropped"
        return "whole" if b"data: [DONE]" in last else "dropped"


async def _taken(taker: socket.socket, most: int) -> bytes:
    async with asyncio.timeout(20):  # longer than the server is silent
        return await asyncio.get_running_loop().sock_recv(taker, most)


async def stream(server: Server, number: int, rng: random.Random) -> str:
    """Reads all, beside others, and gets the text that it gets alone."""
    body = {**ORDINARY, "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 200}
    assert await text(server, {**body, "stream": True}) == await text(server, body)
    return "whole"


async def malformed(server: Server, number: int, rng: random.Random) -> str:
    path, body = rng.choice(BODIES)
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 3)):
            body = mutate_value(rng, body)
        return await outcome(server, request(path, encode(rng, body)))
    return await outcome(server, request(path, mutate_bytes(rng, json.dumps(body).encode())))


async def oversized(server: Server, number: int, rng: random.Random) -> str:
    """More than the server takes: said and not sent, sent, or sent without saying so."""
    much = b" " * (17 << 20)
    kinds = (
        request("/tokenize", b"", length=10**9),
        request("/tokenize", much),
        request("/tokenize", b"%x\r\n%b\r\n0\r\n\r\n" % (len(much), much), "Transfer-Encoding: chunked").replace(
            b"Content-Length", b"X-Length"
        ),
    )
    found = await outcome(server, kinds[number % len(kinds)])
    assert found == "413", found
    return found


async def deep(server: Server, number: int, rng: random.Random) -> str:
    """Half a million brackets, closed or not."""
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inside = opening * 500_000 + b"1" + closing * rng.choice((500_000, 0))
    key = rng.choice((b"prompt", b"messages", b"tools", b"input", b"metadata"))
    found = await outcome(server, request(BODIES[number % len(BODIES)][0], b'{"%b":%b}' % (key, inside)))
    assert found == "400", found
    return found


async def flood(server: Server, number: int, rng: random.Random) -> str:
    """Many headers, long ones, a long path, and headers without an end."""
    kinds = (
        request("/tokenize", {"prompt": "a"}, *(f"X-{count}: 1" for count in range(1000))),
        request("/tokenize", {"prompt": "a"}, "X-Long: " + "x" * 40_000),
        request("/tokenize", {"prompt": "a"}, "X-Longer: " + "x" * (1 << 20)),
        request("/" + "x" * 10_000, {"prompt": "a"}),
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\n" + b"X-Again: x\r\n" * 100_000,
    )
    try:
        found = await outcome(server, kinds[number % len(kinds)])
    except (asyncio.IncompleteReadError, ConnectionError):  # closed while more was sent
        return "cut"
    assert found in ("400", "413"), found
    return found


async def half_sent(server: Server, number: int, rng: random.Random) -> str:
    """Begins a request, or does not even, and stays."""
    whole = request("/v1/completions", ORDINARY)
    head = whole.index(b"\r\n\r\n") + 4
    end = (0, rng.randrange(1, head), head, rng.randrange(head, len(whole)))[number % 4]
    async with connected(server) as (reader, writer):
        writer.write(whole[:end])
        try:
            async with asyncio.timeout(server.patience):
                said = await reader.read()
        except TimeoutError:
            return "open"
        return said.split()[1].decode() if said else "closed"


async def wrong_key(server: Server, number: int, rng: random.Random) -> str:
    key = rng.choice(("", "secre", "secrets", "Secret", "x" * 5000, "%00", "ann"))
    path, body = rng.choice(BODIES)
    found = await outcome(server, request(path, body, key=key))
    assert found == "401", found
    return found


@dataclasses.dataclass(frozen=True)
class Group:
    client: Callable[[Server, int, random.Random], Awaitable[str]]
    count: int
    at_once: int


GROUPS = {
    "vanishing": Group(vanishing, 1000, 100),
    "slow": Group(slow, 200, 200),
    "streams": Group(stream, 64, 64),
    "malformed": Group(malformed, 2000, 16),
    "oversized": Group(oversized, 60, 8),
    "deep": Group(deep, 60, 4),
    "floods": Group(flood, 200, 16),
    "half-sent": Group(half_sent, 200, 200),
    "wrong-keys": Group(wrong_key, 500, 16),
}


async def crowd(server: Server, group: Group, count: int, seed: int | str) -> Counter[str]:
    """How it went for so many clients of a group."""
    free = asyncio.Semaphore(group.at_once)

    async def one(number: int) -> str:
        async with free:
            return await group.client(server, number, random.Random(f"{seed}/{number}"))

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(number)) for number in range(count)]
    return Counter(task.result() for task in running)
