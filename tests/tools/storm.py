"""Storms a server of the bundled model with clients that misbehave. After each group of them it is as it was before.

    python -m tests.tools.storm > docs/results/serving_storm.json
    python -m tests.tools.storm --vanishing 100 --slow 0 --patience 5    # 0 leaves a group out

"As before" means: an ordinary request gets the same text, nothing runs or waits, connections are closed, resident
memory is back within 5 %, no reply was a 500, and the log has no traceback. Otherwise it ends with an AssertionError.
One process with one event loop is all the clients. Needs Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.tools.bad_clients import (
    ASK_SECONDS,
    BODIES,
    GROUPS,
    KEY,
    LONG,
    ORDINARY,
    SAY,
    Group,
    Server,
    ask,
    connected,
    crowd,
    outcome,
    request,
    text,
    text_of,
)

ROOT = Path(__file__).parents[2]
SETTLE_SECONDS = 30.0  # until everything is as before
DROP_SECONDS = 75.0  # until the server has dropped those who do not read: it waits for the app, then for the system
MEMORY_SHARE = 0.05
WARM_PROMPTS = 60  # they fill the prefix cache
WAYS: tuple[tuple[dict, ...], ...] = (  # to draw; each combination is a program
    ({"temperature": 0}, {"temperature": 0.5}, {"temperature": 0.5, "top_k": 5}),
    ({}, {"presence_penalty": 1}),
    ({}, {"logprobs": True, "top_logprobs": 1}),
    ({}, {"response_format": {"type": "json_object"}}),
)


@dataclasses.dataclass(frozen=True)
class Process(Server):
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) << 10

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextlib.contextmanager
def started(patience: float) -> Iterator[Process]:
    """A server on a port that was free."""
    with tempfile.TemporaryDirectory() as folder:
        keys, log = Path(folder, "keys"), Path(folder, "log")
        keys.write_text(f"ann {KEY}\n")
        command = [sys.executable, ROOT / "scripts" / "serve.py", "--port", "0", "--api-key-file", keys]
        with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            try:
                assert process.stdout is not None
                found = re.search(rb"http://127.0.0.1:(\d+)", process.stdout.readline())
                assert found, log.read_text()
                yield Process(int(found[1]), patience, process, log)
            finally:
                process.kill()


async def gauges(server: Server) -> tuple[float, float]:
    """How many run and wait."""
    status, said = await ask(server, request("/metrics", b"").replace(b"POST", b"GET", 1))
    assert status == 200, said
    running, waiting = re.findall(r"^mimo:num_requests_\w+{.*} (\S+)$", said, re.MULTILINE)
    return float(running), float(waiting)


@dataclasses.dataclass(frozen=True)
class Before:
    text: str
    descriptors: int
    memory: float  # bytes; infinity: not compared


async def warm_up(server: Server, count: int) -> None:
    """As much as the prefix cache holds, and what compiles: each way to draw, alone and beside others."""
    for path, body in BODIES:
        await outcome(server, request(path, body))
    for number in range(WARM_PROMPTS if count else 0):
        body = {**ORDINARY, "prompt": f"{number} " * (number + 1), "max_tokens": 2 + 3 * number}
        await text(server, {**body, "logprobs": number % 2 or None})
    for at_once in (1, 4, 4, 4):
        await crowd(server, Group(drawing, count, at_once), count, at_once)


async def drawing(server: Server, number: int, rng: random.Random) -> str:
    body = {"messages": SAY, "max_tokens": 24}
    for fields in WAYS:
        body |= rng.choice(fields)
    return await outcome(server, request("/v1/chat/completions", body))


async def settled(server: Process, before: Before) -> dict[str, float]:
    """What it holds, and how long it took to be as before; AssertionError if it is not."""
    began = time.monotonic()
    assert await text(server, ORDINARY) == before.text, "the text has changed"
    while True:
        now, held, seconds = await gauges(server), server.memory, time.monotonic() - began
        if not any(now) and server.descriptors <= before.descriptors and held <= before.memory * (1 + MEMORY_SHARE):
            break
        found = f"running and waiting {now}, {server.descriptors} descriptors, {held} bytes"
        assert seconds < SETTLE_SECONDS, f"{found}; before: {before}"
        await asyncio.sleep(0.2)
    check_log(server)
    return {"memory_mb": round(held / 1e6, 1), "settled_seconds": round(seconds, 1)}


def check_log(server: Process) -> None:
    log = server.log.read_text()
    assert "Traceback" not in log, log[-5000:]


async def ended(server: Process) -> int:
    """The exit code after SIGTERM in a stream, which is completed."""
    expected = await text(server, LONG)
    async with asyncio.timeout(ASK_SECONDS), connected(server) as (reader, writer):
        writer.write(request("/v1/completions", LONG))
        begin = await reader.readuntil(b"data: ")
        server.process.send_signal(signal.SIGTERM)
        said = begin + await reader.readuntil(b"\r\n0\r\n\r\n")
    assert text_of(said.decode()) == expected
    return await asyncio.to_thread(server.process.wait, 60)


async def storm(server: Process, counts: dict[str, int], warm: int, seed: int) -> dict:
    await warm_up(server, warm)
    before = Before(await text(server, ORDINARY), server.descriptors, server.memory if warm else math.inf)
    report: dict = {"memory_mb": round(server.memory / 1e6, 1)}
    for name, group in GROUPS.items():
        began = time.monotonic()
        outcomes = await crowd(server, group, counts[name], seed)
        seconds = round(time.monotonic() - began, 1)
        assert server.patience < DROP_SECONDS or not outcomes["open"], (name, outcomes)
        after = await settled(server, before)
        report[name] = {"clients": counts[name], **dict(sorted(outcomes.items())), "seconds": seconds, **after}
        print(name, report[name], file=sys.stderr, flush=True)
    return {**report, "log_lines": server.log.read_text().count("\n"), "exit_code": await ended(server)}


def run(counts: dict[str, int], warm: int, patience: float, seed: int = 0) -> dict:
    """`counts` of clients by group."""
    began = time.monotonic()
    with started(patience) as server:
        report = asyncio.run(storm(server, counts, warm, seed))
        check_log(server)
    assert report["exit_code"] == 0, report
    return {**report, "seed": seed, "patience": patience, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, group in GROUPS.items():
        parser.add_argument(f"--{name}", type=int, default=group.count, dest=name)
    parser.add_argument("--patience", type=float, default=DROP_SECONDS, help="seconds for which slow clients hold on")
    parser.add_argument("--warm", type=int, default=100, help="requests that make programs; 0: memory is not compared")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(run({name: getattr(args, name) for name in GROUPS}, args.warm, args.patience, args.seed)))


if __name__ == "__main__":
    main()
