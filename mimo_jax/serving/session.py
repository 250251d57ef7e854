"""One person's conversation with an engine: what was said, what it took, and the commands beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mimo_jax.cli.values import output_file
from mimo_jax.errors import UserError
from mimo_jax.files import write_atomically
from mimo_jax.loading import Model
from mimo_jax.serving.dialect import Parser, Part, Piece
from mimo_jax.serving.messages import normalized
from mimo_jax.serving.reply import Reply
from mimo_jax.serving.requests import Finish, Serving, TokenRequest, TooLong, Update, Usage
from mimo_jax.serving.template import ChatTemplate


@dataclasses.dataclass(frozen=True)
class Turn:
    """How an answer ended, and what it took."""

    finish: Finish
    usage: Usage


class Session:
    """`request` is what every answer is asked for with, but for its prompt. A conversation may have `context` tokens;
    whether the model thinks the template decides, unless `thinking` does.
    """

    def __init__(
        self,
        engine: Serving,
        model: Model,
        template: ChatTemplate,
        request: TokenRequest,
        context: int,
        thinking: bool | None = None,
        system: str = "",
    ) -> None:
        self._engine, self._model, self._template = engine, model, template
        self._request, self._context, self._thinking = request, context, thinking
        self._updates = queue.SimpleQueue[Update | None]()  # of the answer under way; None: it is to stop
        self.system = system
        self.history: list[dict[str, Any]] = []
        self.turns: list[Turn] = []

    @property
    def messages(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.history

    def answer(self, text: str) -> Iterator[Piece]:
        """The answer as it comes. At its end it is part of the conversation, stopped or not; without it, neither is
        the question. Raises `TooLong` for a conversation that the context does not hold.
        """
        said = [*self.history, {"role": "user", "content": text}]
        prompt = self._template.render(normalized([*self.messages, said[-1]]), thinking=self._thinking)
        request = self._asked(prompt.ids)
        reply = Reply(self._model.tokenizer, self._model.stop_ids, parser=Parser(prompt.thinks))
        texts: dict[Part, list[str]] = {Part.THINKING: [], Part.ANSWER: []}
        for update in self._run(request):
            pieces = reply.update(update.tokens)
            if update.finish:
                pieces += reply.close(update.finish != "stop")
            for piece in pieces:
                texts[piece.part].append(piece.text)
                yield piece
            if update.finish and update.usage:
                self.turns.append(Turn(update.finish, update.usage))
        message = {"role": "assistant", "content": "".join(texts[Part.ANSWER])}
        if texts[Part.THINKING]:
            message["reasoning_content"] = "".join(texts[Part.THINKING])
        self.history = [*said, message]

    def stop(self) -> None:
        """Ends the answer under way. A signal handler may call it: this kind of queue can be filled within itself."""
        self._updates.put(None)

    def totals(self) -> dict[str, Any]:
        """What all turns took together."""
        usages = [turn.usage for turn in self.turns]
        names = ("prompt_tokens", "cached_tokens", "generated_tokens", "prefill_seconds", "decode_seconds")
        sums = {name: sum(getattr(usage, name) for usage in usages) for name in names}
        rounds = sum(usage.acceptance.rounds for usage in usages)
        return {
            "turns": len(self.turns),
            **sums,
            "tokens_per_second": sums["generated_tokens"] / max(sums["decode_seconds"], 1e-9),
            "tokens_per_round": sum(usage.acceptance.tokens for usage in usages) / max(rounds, 1),
            "finish_reasons": [turn.finish for turn in self.turns],
        }

    def _asked(self, prompt: tuple[int, ...]) -> TokenRequest:
        room = self._context - len(prompt)
        if room < 1:
            raise TooLong(f"the conversation has {len(prompt)} tokens; with an answer it may have {self._context}")
        return dataclasses.replace(self._request, prompt=prompt, max_tokens=min(self._request.max_tokens, room))

    def _run(self, request: TokenRequest) -> Iterator[Update]:
        """What the engine says, up to the end. It hears of a stop here: a signal handler must not wait for locks."""
        updates = self._updates = queue.SimpleQueue()
        ticket = self._engine.submit(request, updates.put)
        finish = None
        try:
            while finish is None:
                update = updates.get()
                if update is None:
                    self._engine.cancel(ticket)
                    continue
                finish = update.finish
                if finish == "error":
                    raise UserError("engine: it failed; this answer is lost")
                yield update
        finally:
            self._engine.cancel(ticket)  # where nobody reads on; of no effect after the end


def obey(session: Session, line: str) -> str:
    """Does what a line that begins with a slash says, and returns what to tell."""
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        raise UserError(f"{reprlib.repr(name)} is no command; /help lists them, and after a space it is text")
    run, *_ = COMMANDS[name]
    return run(session, argument.strip())


def _reset(session: Session, argument: str) -> str:
    session.history = []
    return "a new conversation"


def _system(session: Session, argument: str) -> str:
    session.system = argument
    return "the system message is set" if argument else "there is no system message"


def _save(session: Session, argument: str) -> str:
    try:
        path = output_file(str(Path(argument).expanduser()))
    except (argparse.ArgumentTypeError, RuntimeError) as error:
        raise UserError(f"/save: {error}") from None
    text = json.dumps({"messages": session.messages}, ensure_ascii=False, indent=2) + "\n"
    write_atomically(path, text.encode())
    return f"{path}: {len(session.messages)} messages"


def _help(session: Session, argument: str) -> str:
    lines = [f"{f'{name} {takes}':<14}{meaning}" for name, (_, takes, meaning) in COMMANDS.items()]
    return "\n".join([*lines, "Ctrl-C stops an answer; at the prompt it leaves, and so does Ctrl-D."])


# By name: what runs, what it takes, what it does.
COMMANDS: dict[str, tuple[Callable[[Session, str], str], str, str]] = {
    "/reset": (_reset, "", "begins a new conversation"),
    "/system": (_system, "TEXT", "tells the model TEXT before the conversation; without TEXT, nothing"),
    "/save": (_save, "FILE", "writes the conversation as JSON, in the form that servers take"),
    "/help": (_help, "", "lists these"),
}
