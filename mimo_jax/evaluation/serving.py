"""How long those who are served wait, for their first token and between tokens: at the engine, and through HTTP.

The server is a process of its own; the engine beside it, and all clients, are in this one, on one event loop. So on two
cores clients take time from the server. Connections are new for each request, which is timed from before it connects.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.cli.guard import enable_compilation_cache
from mimo_jax.decode.sampling import Greedy
from mimo_jax.evaluation.native_speed import prompt_of
from mimo_jax.evaluation.speed import spread
from mimo_jax.loading import Model, load
from mimo_jax.serving.engine import Engine, Limits
from mimo_jax.serving.requests import TokenRequest, Update
from mimo_jax.tokenizer import Tokenizer

Record = dict[str, Any]
PROMPTS = (20, 500)  # tokens, uniformly
LONGEST_PAUSE = 1.0  # seconds before a request of an idle client, uniformly from 0
PERCENTILES = (50, 99)


@dataclasses.dataclass(frozen=True)
class Load:
    """`requests` of each client, one after the other: with pauses, or at once."""

    clients: int
    requests: int
    has_pauses: bool

    def __str__(self) -> str:
        return f"{'idle' if self.has_pauses else 'loaded'}, {self.clients} client{'s' * (self.clients > 1)}"


@dataclasses.dataclass(frozen=True)
class Reply:
    """When it was asked for, and of each piece when it came, and how many tokens it had; in seconds."""

    asked: float
    arrivals: Sequence[tuple[float, int]]

    @property
    def first(self) -> float:
        return self.arrivals[0][0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Of each token after the first piece: its share of the time that its piece took."""
        return [
            (now - before) / count
            for (before, _), (now, count) in itertools.pairwise(self.arrivals)
            for _ in range(count)
        ]


def loads(clients: Sequence[int]) -> list[Load]:
    idle = [Load(count, max(4, 24 // count), True) for count in clients]
    return idle + [Load(count, max(4, 48 // count), False) for count in clients]


def measure(directory: Path, slots: int, clients: Sequence[int], tokens: int, rounds: int) -> Record:
    """By load, then "engine" or "http": medians over rounds, and their range, of what `_summary` has."""
    model, rng = load(directory, draft="none"), np.random.default_rng(0)
    kinds = loads(clients)
    found: dict[str, dict[str, list[Record]]] = {str(kind): {"engine": [], "http": []} for kind in kinds}
    with Engine(model, Limits(slots)) as engine, serving(directory, slots) as port:
        _both(model, engine, port, Load(max(clients), 4, False), tokens, rng)  # compiles
        for _ in range(rounds):
            for kind in kinds:
                for way, summary in _both(model, engine, port, kind, tokens, rng).items():
                    found[str(kind)][way].append(summary)
    return {kind: {way: _spreads(turns) for way, turns in ways.items()} for kind, ways in found.items()}


def _spreads(turns: Sequence[Record]) -> Record:
    return {name: spread([turn[name] for turn in turns]) for name in turns[0]}


def _both(model: Model, engine: Engine, port: int, kind: Load, tokens: int, rng: np.random.Generator) -> Record:
    """The same prompts both ways. Nobody has read them before, and nothing is cached of them."""
    count = kind.clients * kind.requests
    lengths, seeds = rng.integers(*PROMPTS, count, endpoint=True), rng.integers(0, 2**32, count)
    prompts = [prompt_of(model, int(length), int(seed)) for length, seed in zip(lengths, seeds)]
    pauses = rng.uniform(0, LONGEST_PAUSE * kind.has_pauses, count)
    texts: dict[int, list[int]] = {}

    async def at_engine(number: int) -> Reply:
        reply, texts[number] = await ask_engine(engine, prompts[number], tokens)
        return reply

    async def through_http(number: int) -> Reply:
        return await ask_server(port, prompts[number], tokens, model.tokenizer, texts[number])

    return {"engine": _run(kind, at_engine, [*pauses]), "http": _run(kind, through_http, [*pauses])}


def _run(kind: Load, ask: Callable[[int], Awaitable[Reply]], pauses: Sequence[float]) -> Record:
    async def client(first: int) -> list[Reply]:
        replies = []
        for number in range(first, first + kind.requests):
            await asyncio.sleep(pauses[number])
            replies.append(await ask(number))
        return replies

    async def all_clients() -> list[list[Reply]]:
        return await asyncio.gather(*(client(index * kind.requests) for index in range(kind.clients)))

    began = time.perf_counter()
    replies = [reply for one in asyncio.run(all_clients()) for reply in one]
    return _summary(replies, time.perf_counter() - began)


def _summary(replies: Sequence[Reply], seconds: float) -> Record:
    firsts, gaps = [reply.first for reply in replies], [gap for reply in replies for gap in reply.gaps] or [0.0]
    waits = {"first token": firsts, "between tokens": gaps}
    return {
        **{f"{what}, p{of}, ms": 1e3 * float(np.percentile(waits[what], of)) for what in waits for of in PERCENTILES},
        "requests per second": len(replies) / seconds,
        "tokens per second": sum(count for reply in replies for _, count in reply.arrivals) / seconds,
    }


async def ask_engine(engine: Engine, prompt: Sequence[int], tokens: int) -> tuple[Reply, list[int]]:
    """And the text, as token ids. The engine's own thread takes the time."""
    loop, is_over = asyncio.get_running_loop(), asyncio.Event()
    found: list[tuple[float, Update]] = []

    def sink(update: Update) -> None:
        found.append((time.perf_counter(), update))
        if update.finish:
            loop.call_soon_threadsafe(is_over.set)

    request = TokenRequest(tuple(prompt), tokens, Greedy(), stop_ids=())
    asked = time.perf_counter()
    engine.submit(request, sink)
    await is_over.wait()
    arrivals = [(when, len(update.tokens)) for when, update in found if update.tokens]
    return Reply(asked, arrivals), [token for _, update in found for token in update.tokens]


async def ask_server(port: int, prompt: Sequence[int], tokens: int, tokenizer: Tokenizer, text: list[int]) -> Reply:
    """`text` is what will be said: it tells how many tokens a piece has."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    data, lines = json.dumps(body).encode(), list[tuple[float, bytes]]()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    asked = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + b"\r\n\r\n" + data)
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
        assert line, "the server has closed the connection"
        if line.startswith(b"data: "):
            lines.append((time.perf_counter(), line))
    writer.close()
    pieces = [(when, json.loads(line[len("data: ") :])["choices"][0]["text"]) for when, line in lines]
    return Reply(asked, _counted(pieces, tokenizer, text))


def _counted(pieces: Sequence[tuple[float, str]], tokenizer: Tokenizer, text: list[int]) -> list[tuple[float, int]]:
    """Tokens instead of texts, but for pieces that end none."""
    ends = [len(tokenizer.decode(text[:count])) for count in range(1, len(text) + 1)]
    assert "".join(piece for _, piece in pieces) == tokenizer.decode(text), "the server says something else"
    found, letters, before = [], 0, 0
    for when, piece in pieces:
        letters += len(piece)
        count = bisect.bisect_right(ends, letters)
        if count > before:
            found.append((when, count - before))
        before = max(before, count)
    return found


@contextlib.contextmanager
def serving(directory: Path, slots: int) -> Iterator[int]:
    """The port of a server in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, directory, slots), daemon=True)
    process.start()
    there.close()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def _serve(parent: Connection, directory: Path, slots: int) -> None:
    from mimo_jax.serving.http.app import create_app
    from mimo_jax.serving.http.server import Server, listen
    from mimo_jax.serving.http.service import Service

    enable_compilation_cache()
    model = load(directory, draft="none")
    with listen("127.0.0.1", 0) as listener, Engine(model, Limits(slots)) as engine:
        service = Service.of(model, engine, directory, "model", engine.context)
        parent.send(listener.getsockname()[1])
        Server(create_app(service), service, grace=0).run([listener])
