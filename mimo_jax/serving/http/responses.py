"""POST /v1/responses, without memory: the whole conversation comes as items, and the reply is items, too."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from mimo_jax.serving.http import sse
from mimo_jax.serving.http.conversation import Conversation
from mimo_jax.serving.http.errors import bad_request, from_exception
from mimo_jax.serving.http.response_items import messages_of
from mimo_jax.serving.http.response_output import Output
from mimo_jax.serving.http.sampling import (
    FLAG,
    LIST,
    LOGPROBS,
    OBJECT,
    OBJECTS,
    SAMPLING,
    TEXT,
    Field,
    Fields,
    naming,
    one_of,
    read_fields,
    whole,
)
from mimo_jax.serving.http.service import Service
from mimo_jax.serving.http.turn import Run
from mimo_jax.serving.http.usage import speculation, tokens_of
from mimo_jax.serving.messages import checked_functions

NOT_KEPT = Field(lambda value: False, "absent: this server keeps nothing; send the whole conversation as input")
INCLUDE_LOGPROBS = "message.output_text.logprobs"

RESPONSES = {
    **{
        name: SAMPLING[name]
        for name in ("model", "temperature", "top_p", "top_k", "seed", "stream", "user", "metadata")
    },
    "input": Field(
        lambda value: isinstance(value, str) or (OBJECTS.holds(value) and value), "a string or a list of items"
    ),
    "instructions": TEXT,
    "tools": OBJECTS,
    "tool_choice": Field(lambda value: isinstance(value, str | dict), "a string or an object"),
    "parallel_tool_calls": FLAG,
    "text": OBJECT,
    "max_output_tokens": whole(1),
    "reasoning": OBJECT,
    "include": LIST,
    "top_logprobs": LOGPROBS,
    "background": Field(lambda value: value is False, "false: this server keeps nothing"),
    **dict.fromkeys(("previous_response_id", "conversation", "prompt"), NOT_KEPT),
}
# Of fields that are objects, or may be.
TOOL = {"type": one_of("function"), "strict": FLAG}
TOOL_CHOICE = {"tool_choice": one_of("none", "auto", "required")}
NAMED_TOOL = {"type": one_of("function"), "name": TEXT}
ANSWER = {"format": OBJECT}
FORMAT = {"type": one_of("text", "json_object", "json_schema"), "schema": OBJECT, "strict": FLAG}
EFFORT = {"effort": TEXT}


class Responses:
    """One request of this route."""

    def __init__(self, service: Service, body: Mapping[str, Any], account: str) -> None:
        fields = read_fields(body, RESPONSES, needed=["input"])
        service.check_name(fields.get("model"))
        self.is_streamed, self._spelling = fields.get("stream", False), service.spelling
        self._head = _head(service.name, fields)
        top_logprobs = _top_logprobs(fields)
        limit = {"max_tokens": fields["max_output_tokens"]} if "max_output_tokens" in fields else {}
        with naming(RESPONSES, response_format="text.format"):
            conversation = conversation_of(fields)
            if conversation.tools and top_logprobs is not None:
                raise bad_request(f"include: {INCLUDE_LOGPROBS} is of texts alone; ask without tools", "include")
            self.turns = [conversation.turn(service, {**fields, **limit}, account, top_logprobs)]

    async def whole(self, run: Run) -> dict[str, Any]:
        output = Output(self._spelling)
        async for event in run:
            output.take(event)
        return self._reply(run, output)

    async def messages(self, run: Run) -> AsyncIterator[bytes]:
        output, numbers = Output(self._spelling), itertools.count()

        def event_of(kind: str, **fields: Any) -> bytes:
            return sse.event({"type": f"response.{kind}", "sequence_number": next(numbers), **fields})

        try:
            yield event_of("created", response=self._head)
            yield event_of("in_progress", response=self._head)
            async for event in run:
                for kind, fields in output.take(event):
                    yield event_of(kind, **fields)
            status = _status(run)
            for kind, fields in output.close(status):
                yield event_of(kind, **fields)
            yield event_of(status, response=self._reply(run, output))
        except Exception as error:
            failure = {"code": "server_error", "message": from_exception(error).message}
            found = {"status": "failed", "error": failure, "output": output.items("incomplete")}
            yield event_of("failed", response={**self._head, **found})

    def _reply(self, run: Run, output: Output) -> dict[str, Any]:
        status, tokens = _status(run), tokens_of(run)
        usage = {
            "input_tokens": tokens.prompt,
            "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},  # they cost nothing
            "output_tokens": tokens.completion,
            "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
            "total_tokens": tokens.total,
        }
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output.items(status),
            "usage": usage,
            **speculation(run),
        }


def _status(run: Run) -> str:
    return "incomplete" if run.choices[0].finish == "length" else "completed"


def _head(model: str, fields: Fields) -> dict[str, Any]:
    """A response that has just begun, with what was asked for."""
    return {
        "id": f"resp_{secrets.token_hex(16)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "temperature": fields.get("temperature"),
        "top_p": fields.get("top_p"),
        "top_logprobs": fields.get("top_logprobs", 0),
        "tools": fields.get("tools", []),
        "tool_choice": fields.get("tool_choice", "auto"),
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "text": {"format": {"type": "text"}, **fields.get("text", {})},
        "reasoning": {"effort": None, "summary": None, **fields.get("reasoning", {})},
        "metadata": fields.get("metadata", {}),
        "user": fields.get("user"),
        "previous_response_id": None,
        "background": False,
        "store": False,
        "truncation": "disabled",
    }


# What a body asks for.


def conversation_of(fields: Fields) -> Conversation:
    tools, choice = fields.get("tools", []), _tool_choice(fields)
    for place, tool in enumerate(tools):
        read_fields(tool, TOOL, f"tools[{place}].", needed=["type"])
    declared = checked_functions(tools, "tools[{}]")
    if choice == "none":
        declared, choice = [], "auto"
    effort = read_fields(fields.get("reasoning", {}), EFFORT, "reasoning.").get("effort")
    return Conversation(
        messages_of(fields),
        declared,
        choice,
        fields.get("parallel_tool_calls", True),
        None if effort is None else effort != "none",
        {},
        *_schema(fields),
    )


def _tool_choice(fields: Fields) -> str | Mapping[str, Any]:
    choice = fields.get("tool_choice", "auto")
    if isinstance(choice, str):
        return read_fields({"tool_choice": choice}, TOOL_CHOICE)["tool_choice"]
    return read_fields(choice, NAMED_TOOL, "tool_choice.", needed=NAMED_TOOL)


def _schema(fields: Fields) -> tuple[Mapping[str, Any] | None, bool]:
    """What the answer must be, None for text; and whether strictly."""
    answer = read_fields(fields.get("text", {}), ANSWER, "text.").get("format", {})
    found = read_fields(answer, FORMAT, "text.format.")
    kind = found.get("type", "text")
    if kind == "json_schema":
        return read_fields(answer, FORMAT, "text.format.", needed=["schema"])["schema"], found.get("strict", False)
    return ({"type": "object"} if kind == "json_object" else None), False


def _top_logprobs(fields: Fields) -> int | None:
    if INCLUDE_LOGPROBS in fields.get("include", []):
        return fields.get("top_logprobs", 0)
    if fields.get("top_logprobs"):
        raise bad_request(f"top_logprobs needs {INCLUDE_LOGPROBS} in include", "top_logprobs")
    return None
