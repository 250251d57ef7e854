"""POST /v1/completions: texts, or token ids, are continued as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from mimo_jax.serving.dialect import Piece
from mimo_jax.serving.http import sse
from mimo_jax.serving.http.errors import bad_request
from mimo_jax.serving.http.logprobs import CompletionRows
from mimo_jax.serving.http.sampling import (
    FLAG,
    LOGPROBS,
    MOST_CHOICES,
    NOT_SERVED,
    SAMPLING,
    Field,
    check_tokens,
    is_tokens,
    naming,
    read_fields,
    stop_strings,
    token_request,
)
from mimo_jax.serving.http.service import Service
from mimo_jax.serving.http.turn import Run, Turn
from mimo_jax.serving.http.usage import StreamUsage, counts
from mimo_jax.serving.requests import Logprob


def _is_prompt(value: Any) -> bool:
    if not isinstance(value, list):
        return isinstance(value, str)
    return is_tokens(value) or all(isinstance(one, str) or is_tokens(one) for one in value)


COMPLETION = {
    **SAMPLING,
    "prompt": Field(_is_prompt, "a string, a list of strings, or one or more lists of token ids"),
    "echo": FLAG,
    "logprobs": LOGPROBS,
    "suffix": NOT_SERVED,
    "best_of": Field(lambda value: value == 1, "1: for more choices there is n"),
}


class Completions:
    """One request of this route."""

    def __init__(self, service: Service, body: Mapping[str, Any], account: str) -> None:
        fields = read_fields(body, COMPLETION)
        service.check_name(fields.get("model"))
        self.is_streamed, self._usage = fields.get("stream", False), StreamUsage(fields)
        self._top_logprobs = fields.get("logprobs")
        if fields.get("echo") and self._top_logprobs is not None:
            raise bad_request("echo: a prompt's own logarithms are not known; ask without logprobs", "echo")
        self._head = service.head("cmpl-", "text_completion")
        prompts = [_encoded(service, prompt) for prompt in _prompts(fields.get("prompt"))]
        samples = fields.get("n", 1)
        if len(prompts) * samples > MOST_CHOICES:
            raise bad_request(f"prompt: {len(prompts)} of them, n={samples} times, exceed {MOST_CHOICES}", "prompt")
        with naming(COMPLETION):
            requests = [token_request(service, fields, ids, account) for ids, _ in prompts]
        self.turns = [
            Turn(dataclasses.replace(request, top_logprobs=self._top_logprobs), stop_strings(fields))
            for request in requests
        ]
        # Of each choice.
        self._begins = [text if fields.get("echo") else "" for _, text in prompts for _ in range(samples)]
        self._rows = [CompletionRows(service.spelling, len(begin)) for begin in self._begins]

    async def whole(self, run: Run) -> dict[str, Any]:
        texts, rows = [[begin] for begin in self._begins], [list[Logprob]() for _ in self._begins]
        async for event in run:
            texts[event.choice].append(_text(event.pieces))
            rows[event.choice] += event.rows
        choices = [
            self._choice(index, "".join(texts[index]), rows[index], choice.finish)
            for index, choice in enumerate(run.choices)
        ]
        return {**self._head, "choices": choices, **counts(run)}

    async def messages(self, run: Run) -> AsyncIterator[bytes]:
        for index, begin in enumerate(self._begins):
            if begin:
                yield self._chunk(run, self._choice(index, begin, [], None))
        async for event in run:
            yield self._chunk(run, self._choice(event.choice, _text(event.pieces), event.rows, event.finish))
        if self._usage.is_included:
            yield sse.message({**self._head, "choices": [], **counts(run)})
        yield sse.DONE

    def _choice(self, index: int, text: str, rows: Sequence[Logprob], finish: str | None) -> dict[str, Any]:
        logprobs = None if self._top_logprobs is None else self._rows[index].add(rows)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _chunk(self, run: Run, choice: dict[str, Any]) -> bytes:
        return sse.message({**self._head, "choices": [choice], **self._usage.of_chunk(run)})


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of any of the forms; none is empty."""
    found = [prompt] if isinstance(prompt, str) or is_tokens(prompt) else prompt
    if not found or not all(found):
        raise bad_request("prompt: missing or empty; at least one token is needed", "prompt")
    return found


def _encoded(service: Service, prompt: str | list[int]) -> tuple[list[int], str]:
    """Both forms of a prompt. Names of special tokens are those tokens: conversations can be spelled by hand."""
    if isinstance(prompt, str):
        return service.tokenizer.encode(prompt), prompt
    check_tokens(prompt, service.vocab_size, "prompt")
    return prompt, service.tokenizer.decode(prompt)
