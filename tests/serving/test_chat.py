"""The terminal chat: what its user says and sees, with an engine that plays answers from a script."""

import contextlib
import importlib.util
import io
import json
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mimo_jax.cli.guard import main_guard
from mimo_jax.errors import UserError
from mimo_jax.generation import Acceptance
from mimo_jax.loading import BUNDLED, Model, load
from mimo_jax.serving.dialect import Part
from mimo_jax.serving.requests import Sink, Stats, TokenRequest, TooLong, Update, Usage
from mimo_jax.serving.session import Session, obey
from mimo_jax.serving.template import ChatTemplate
from mimo_jax.tokenizer import TURN_END

ROOT = Path(__file__).parents[2]


class Script:
    """An engine whose n-th answer is the n-th of `texts`, a token per update.

    After "..." it waits to be cancelled, or to be closed if it is deaf.
    """

    context = 1024

    def __init__(self, model: Model, texts: list[str]) -> None:
        self._model, self._texts = model, iter(texts)
        self.requests: list[TokenRequest] = []
        self.threads: list[threading.Thread] = []
        self.cancelled: list[threading.Event] = []
        self.is_closed = self.is_deaf = False

    def submit(self, request: TokenRequest, sink: Sink) -> int:
        self.requests.append(request)
        self.cancelled.append(threading.Event())
        thread = threading.Thread(target=self._play, args=(next(self._texts), request, sink, self.cancelled[-1]))
        self.threads.append(thread)
        thread.start()
        return len(self.requests) - 1

    def _play(self, text: str, request: TokenRequest, sink: Sink, cancelled: threading.Event) -> None:
        waits, fails = text.endswith("..."), text == "fails"
        ids = self._model.tokenizer.encode(text if waits else text + TURN_END)[: request.max_tokens]
        for token in ids:
            sink(Update(0, (token,)))
        finish = "error" if fails else "stop" if ids[-1] in self._model.stop_ids else "length"
        if waits:
            finish = "cancelled" if cancelled.wait(20) else "error"
            while self.is_deaf and not self.is_closed:
                time.sleep(0.01)
        acceptance = Acceptance(len(ids) // 2, len(ids), [1], [1])
        sink(Update(0, finish=finish, usage=Usage(len(request.prompt), 0, len(ids), 0.0, 0.1, 0.5, acceptance)))

    def cancel(self, ticket: int, sample: int | None = None) -> None:
        self.cancelled[ticket].set()

    def stats(self) -> Stats:
        raise NotImplementedError

    def close(self, grace: float = 0.0) -> None:
        self.is_closed = True
        for event in self.cancelled:
            event.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C comes through, as in a terminal. A background job's shell has it ignored, and tests would wait."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(BUNDLED)


@pytest.fixture
def played(model, monkeypatch) -> Iterator[Callable[..., Script]]:
    """Makes the engine that the chat will find."""
    engines = []

    def make(*texts: str) -> Script:
        engines.append(Script(model, list(texts)))
        module: Any = types.ModuleType("mimo_jax.serving.engine")
        module.Engine, module.Limits = lambda model, limits: engines[-1], types.SimpleNamespace
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def session_of(model: Model, engine: Script, **options) -> Session:
    request = TokenRequest((), max_tokens=options.pop("max_tokens", 100))
    return Session(engine, model, ChatTemplate.load(BUNDLED, model.tokenizer), request, engine.context, **options)


def said(session: Session, text: str) -> str:
    return "".join(piece.text for piece in session.answer(text))


def test_every_turn_is_told_all_that_was_said(model, played):
    """The prompt is the conversation as the template writes it, with thinking apart from answers."""
    engine = played("One.", "<think>Hm.</think>Two.", "Three.")
    session = session_of(model, engine, system="Count.", thinking=False)
    assert [said(session, text) for text in ("a", "<|im_end|>b", "c")] == ["One.", "Hm.Two.", "Three."]
    assert session.messages == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "<|im_end|>b"},
        {"role": "assistant", "content": "Two.", "reasoning_content": "Hm."},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "Three."},
    ]
    last = model.tokenizer.backend.decode(list(engine.requests[-1].prompt), skip_special_tokens=False)
    assert last == (
        "<|im_start|>system\nCount.<|im_end|><|im_start|>user\na<|im_end|><|im_start|>assistant\nOne.<|im_end|>"
        "<|im_start|>user\n<|im_end|>b<|im_end|><|im_start|>assistant\nTwo.<|im_end|>"
        "<|im_start|>user\nc<|im_end|><|im_start|>assistant\n<think></think>"
    )
    assert engine.requests[-1].prompt.count(model.tokenizer.id_of(TURN_END)) == 6
    assert [turn.finish for turn in session.turns] == ["stop"] * 3


def test_an_answer_that_is_stopped_is_part_of_the_conversation(model, played):
    """From within a signal handler; the engine hears of it once the reader comes round."""
    engine = played("One two...", "Three.")
    session = session_of(model, engine)
    pieces = session.answer("a")
    first = next(pieces)
    session.stop()
    rest = "".join(piece.text for piece in pieces)
    assert (first.part, first.text + rest) == (Part.ANSWER, "One two...")
    assert session.turns[0].finish == "cancelled" and session.history[-1]["content"] == "One two..."
    assert said(session, "b") == "Three."


def test_a_reader_who_leaves_ends_the_answer(model, played):
    engine = played("One two...")
    session = session_of(model, engine)
    pieces = session.answer("a")
    next(pieces)
    pieces.close()
    assert engine.cancelled[0].is_set() and session.history == []


def test_what_fails_leaves_the_conversation_as_it_was(model, played):
    engine = played("One.", "fails", "Three.")
    session = session_of(model, engine)
    said(session, "a")
    before = list(session.history)
    with pytest.raises(UserError, match="engine: it failed"):
        said(session, "b")
    with pytest.raises(TooLong, match=r"the conversation has [0-9]+ tokens; with an answer it may have 1024"):
        said(session, "word " * 2000)
    with pytest.raises(UserError, match=r"messages\[2\].content: half of a surrogate pair"):
        said(session, "\udce9")
    assert session.history == before and said(session, "c") == "Three."


def test_answers_fit_the_context_and_the_limit(model, played):
    engine = played("One two three four five six", "One two three four five six")
    session = session_of(model, engine, max_tokens=4)
    said(session, "a")
    assert session.turns[0].finish == "length" and session.turns[0].usage.generated_tokens == 4
    session = session_of(model, engine, max_tokens=4096)
    said(session, "a")
    assert len(engine.requests[-1].prompt) + engine.requests[-1].max_tokens == engine.context


def test_commands(model, played, tmp_path, monkeypatch):
    """Each does what /help says of it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    session = session_of(model, played("Öne.", "Two.", "Three."))
    said(session, "a")
    obey(session, "/system Be short.  ")
    assert obey(session, "/save ~/talk.json") == f"{tmp_path / 'talk.json'}: 3 messages"
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved == {"messages": session.messages} and session.messages[0] == {"role": "system", "content": "Be short."}
    assert "Öne" in (tmp_path / "talk.json").read_text()
    obey(session, "/reset")
    assert session.messages == [{"role": "system", "content": "Be short."}]
    obey(session, "/system")
    assert session.messages == []
    assert all(name in obey(session, "/help") for name in ("/reset", "/system TEXT", "/save FILE", "/help"))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/save", "/save: '.' is no regular file"),
        ("/save /nowhere/talk.json", "/save: '/nowhere/talk.json' cannot be written: No such file"),
        ("/save /dev/null", "no regular file"),
        ("/quit", "'/quit' is no command; /help lists them"),
        ("/usr/bin/env says?", "'/usr/bin/env' is no command"),
        ("/" + "x" * 10_000, "is no command"),
    ],
)
def test_commands_that_cannot_be_obeyed_are_one_line(model, played, line, error):
    with pytest.raises(UserError) as found:
        obey(session_of(model, played()), line)
    assert error in str(found.value) and len(str(found.value)) < 200


@pytest.fixture(scope="module")
def chat() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("chat", ROOT / "scripts" / "chat.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def typed(monkeypatch, *lines: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8"))


def test_each_line_of_a_pipe_is_a_turn(chat, played, monkeypatch, capsys):
    """Answers on standard output, a line of JSON at its end, and everything else beside it."""
    engine = played("One\n\ttwo.", "<think>Hm.</think>Three.", "Four.")
    typed(monkeypatch, b"a", b"", b"/nothing", b"caf\xe9", b"word " * 2000, b"b", b"/reset", b"c")
    chat.main(["--max-tokens", "50", "--seed", "3", "--temperature", "0.5", "--system", "S"])
    out, err = capsys.readouterr()
    *shown, totals = out.splitlines()
    assert "\n".join(shown) == "One\n\ttwo.\nHm.\nThree.\nFour."
    totals = json.loads(totals)
    assert (totals["turns"], totals["finish_reasons"]) == (3, ["stop"] * 3) and totals["tokens_per_round"] > 1
    assert totals["generated_tokens"] == pytest.approx(totals["tokens_per_second"] * 1.5)
    told = err.splitlines()
    assert re.fullmatch(r"\d+ tokens, \d+ tokens/s, \d\.\d\d per round", told[0])
    assert "'/nothing' is no command" in told[1] and "messages[3].content: half of" in told[2]
    assert "the conversation has" in told[3] and told[3].endswith("; /reset begins a new one")
    first, *_, last = engine.requests
    assert (first.seed, first.max_tokens, first.strategy.temperature) == (3, 50, 0.5) and engine.is_closed
    assert len(last.prompt) == len(first.prompt)  # the system message, and one letter


@contextlib.contextmanager
def interrupted_when(holds: Callable[[], bool]) -> Iterator[None]:
    """Ctrl-C, once something holds."""

    def press() -> None:
        deadline = time.monotonic() + 20
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    yield
    thread.join()


def printed(monkeypatch) -> Callable[[str], Callable[[], bool]]:
    """Makes questions whether a text was printed."""
    out, write = [], sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: out.append(text) or write(text))
    return lambda word: lambda: word in "".join(out)


def test_ctrl_c_stops_the_answer_and_keeps_the_session(chat, played, monkeypatch, capsys):
    """Twice in a session, with the guard's own handler around it, which would end the process the second time."""
    engine = played("One...", "Two.", "Three...", "Four.")
    typed(monkeypatch, b"a", b"b", b"c", b"d")
    seen = printed(monkeypatch)
    with interrupted_when(seen("One...")), interrupted_when(seen("Three...")):
        main_guard(lambda: chat.main([]))
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:-1] == ["One...", "Two.", "Three...", "Four."]
    assert json.loads(captured.out.splitlines()[-1])["finish_reasons"] == ["cancelled", "stop", "cancelled", "stop"]
    assert captured.err.count("stopped") == 2 and engine.is_closed


def test_a_second_ctrl_c_leaves_an_answer_that_does_not_end(chat, played, monkeypatch):
    engine = played("One...")
    engine.is_deaf = True
    typed(monkeypatch, b"a")
    seen = printed(monkeypatch)
    with (
        interrupted_when(seen("One...")),
        interrupted_when(lambda: engine.cancelled[:1] and engine.cancelled[0].is_set()),
    ):
        with pytest.raises(SystemExit, match="130"):
            main_guard(lambda: chat.main([]))
    assert engine.is_closed


def test_ctrl_c_at_the_prompt_leaves(chat, played, monkeypatch, capsys):
    engine = played("One.")

    class Typed(io.StringIO):
        def readline(self, *_) -> str:
            if line := super().readline():
                return line
            raise KeyboardInterrupt

        def reconfigure(self, **_) -> None: ...

    monkeypatch.setattr("sys.stdin", Typed("a\n"))
    chat.main([])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["turns"] == 1 and engine.is_closed


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model", "nowhere"], "nowhere: not found"),
        (["--temperature", "-1"], "temperature=-1.0 must be"),
        (["--greedy", "--top-p", "0.5"], "--greedy leaves nothing to"),
        (["--max-tokens", "0"], "--max-tokens: 0 must be"),
    ],
)
def test_wrong_options_are_one_line(chat, monkeypatch, capsys, arguments, error):
    typed(monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        main_guard(lambda: chat.main(arguments))
    assert error in capsys.readouterr().err
