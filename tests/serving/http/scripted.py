"""An engine that says what tests tell it, in the pieces they choose, on a thread of its own; and servers around it."""

import contextlib
import dataclasses
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import get_args

import uvicorn
from starlette.types import ASGIApp

from mimo_jax.config.presets import preset
from mimo_jax.decode.sampling import Sampled
from mimo_jax.errors import UserError
from mimo_jax.generation import Acceptance
from mimo_jax.loading import BUNDLED, Model
from mimo_jax.serving.http.service import Service
from mimo_jax.serving.requests import Finish, Logprob, Sink, Stats, TokenRequest, Update, Usage
from mimo_jax.serving.template import ChatTemplate
from mimo_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(BUNDLED / "tokenizer.json")
STOP = TOKENIZER.id_of("<|im_end|>")
STATS = Stats(4, 1, 2, 30, 0, 100, 0.0, True, 10, 5, 20, 7, 49, (6, 4, 2), {"stop": 3})
CACHED = 2  # tokens of every prompt
# With tools, and with thinking left open where it is asked for.
TEMPLATE = (
    "{%- for tool in tools or [] -%}<|im_start|>system\n{{ tool | tojson }}<|im_end|>{%- endfor -%}"
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{%- endfor -%}"
    "{{ '<|im_start|>assistant\\n' }}{%- if enable_thinking -%}<think>{%- else -%}<think></think>{%- endif -%}"
)
# Tools and messages as templates get them, which `shown_to` reads.
PLAIN_TEMPLATE = (
    "{{ tools | tojson }}{%- for message in messages -%}{{ '\\n' }}{{ message | tojson }}{%- endfor -%}"
    "{{ '\\n<think>' }}{%- if not enable_thinking -%}</think>{%- endif -%}"
)


@dataclasses.dataclass(frozen=True)
class Script:
    """What is said by each sample in turn, by how many tokens at a time, how it ends, and what the end waits for."""

    texts: tuple[str, ...]
    size: int = 3
    finish: Finish = "stop"
    hold: threading.Event | None = None
    error: UserError | None = None  # raised by a submission instead


class ScriptedEngine:
    def __init__(self) -> None:
        self.requests: list[TokenRequest] = []
        self.cancelled: dict[int, set[int]] = {}  # samples, by ticket
        self.stats_now, self._lock = STATS, threading.Lock()
        self.says("Hello")

    def says(self, *texts: str, **script) -> None:
        """What requests get from now on."""
        self.script = Script(texts, **script)

    def submit(self, request: TokenRequest, sink: Sink) -> int:
        if self.script.error:
            raise self.script.error
        with self._lock:
            self.requests.append(request)
            ticket = len(self.requests) - 1
            self.cancelled[ticket] = set()
        run = threading.Thread(target=self._run, args=(self.script, request, self.cancelled[ticket], sink), daemon=True)
        run.start()
        return ticket

    def cancel(self, ticket: int, sample: int | None = None) -> None:
        self.cancelled[ticket] |= set(range(self.requests[ticket].samples)) if sample is None else {sample}

    def stats(self) -> Stats:
        return self.stats_now

    def close(self, grace: float = 0.0) -> None: ...

    def _run(self, script: Script, request: TokenRequest, cancelled: set[int], sink: Sink) -> None:
        for sample, text in zip(range(request.samples), itertools.cycle(script.texts)):
            tokens = [*TOKENIZER.encode(text), *([STOP] if script.finish == "stop" else [])]
            finish = script.finish if len(tokens) <= request.max_tokens else "length"
            tokens, sent = tokens[: request.max_tokens], 0
            while sent < len(tokens) and sample not in cancelled:
                new = tuple(tokens[sent : sent + script.size])
                sent += len(new)
                sink(Update(sample, new, logprobs_of(request, new), usage=usage_of(request, sent)))
            while script.hold and sample not in cancelled and not script.hold.wait(0.005):
                pass
            sink(Update(sample, finish="cancelled" if sample in cancelled else finish, usage=usage_of(request, sent)))


def logprobs_of(request: TokenRequest, tokens: Sequence[int]) -> tuple[Logprob, ...]:
    if request.top_logprobs is None:
        return ()
    return tuple(
        Logprob(token, -0.5, tuple(((token + i) % 4096, -0.5 - i) for i in range(request.top_logprobs)))
        for token in tokens
    )


def usage_of(request: TokenRequest, generated: int) -> Usage:
    rounds = generated // 2
    acceptance = Acceptance(rounds, generated - 1, [rounds, rounds], [rounds, rounds // 2])
    return Usage(len(request.prompt), CACHED, generated, 0.1, 0.2, 0.3, acceptance)


def make_service(engine: ScriptedEngine, template: str | None = None) -> Service:
    config = dataclasses.replace(preset("mimo-tiny"), vocab_size=4096)
    model = Model(config, {}, TOKENIZER, (STOP,), Sampled(0.8, top_p=0.95))
    service = Service.of(model, engine, BUNDLED, "xiaomi/mimo", 500)
    if template:
        service.template = ChatTemplate(template, TOKENIZER)
    return service


def shown_to(engine: ScriptedEngine) -> tuple[list[dict], list[dict]]:
    """The tools and messages of the latest request, which went through `PLAIN_TEMPLATE`."""
    prompt = TOKENIZER.backend.decode(list(engine.requests[-1].prompt), skip_special_tokens=False)
    tools, *messages = map(json.loads, prompt.rpartition("\n<think>")[0].split("\n"))
    return tools or [], messages


def models_of(events) -> dict[str, type]:
    """By its type, each of an official client's union of events."""
    models = get_args(get_args(events)[0])
    return {get_args(model.model_fields["type"].annotation)[0]: model for model in models}


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """A server of this app; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until(holds, seconds: float = 20.0) -> None:
    """Whatever is waited for here comes; only a fault makes it take all that time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
