"""Responses as the official client sees them, with an engine whose answers are known."""

import json
import threading

import httpx2
import openai
import pytest
from hypothesis import given, settings
from openai.types.responses import Response, ResponseStreamEvent

from mimo_jax.decode.sampling import Greedy
from tests.serving.http.mutations import PATIENT, mutated
from tests.serving.http.scripted import CACHED, PLAIN_TEMPLATE, TOKENIZER, make_service, models_of, shown_to, wait_until
from tests.serving.http.test_chat import CALLS, MODEL

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Today's",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "strict": False,
}
EVENTS = models_of(ResponseStreamEvent)
LOGPROBS = "message.output_text.logprobs"


@pytest.fixture(scope="module")
def service(module_engine):
    service = make_service(module_engine, PLAIN_TEMPLATE)
    service.context = 2000
    return service


def ask(client, **fields):
    return client.responses.create(**{"model": MODEL, "input": "Say hello", **fields})


def plain(response) -> dict:
    """What a response says, without what differs from one to the next."""
    found = response.model_dump(exclude={"id", "created_at"})
    for item in found["output"]:
        for name in ("id", "call_id"):
            item.pop(name, None)
    return found


def test_a_response(client, engine):
    """All that the official model requires is there, and tokens are counted under this API's own names."""
    engine.says("Hello, wörld!")
    response = ask(client, instructions="Be kind.", metadata={"a": "b"})
    Response.model_validate(response.model_dump())
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hello"}]
    assert shown_to(engine) == ([], said)
    assert response.output_text == "Hello, wörld!" and response.status == "completed"
    assert (response.id[:5], response.object, response.model) == ("resp_", "response", MODEL)
    assert (response.instructions, response.metadata) == ("Be kind.", {"a": "b"})
    assert response.error is None and response.incomplete_details is None
    usage, prompt = response.usage, len(engine.requests[0].prompt)
    generated = len(TOKENIZER.encode("Hello, wörld!")) + 1
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (prompt, generated, prompt + generated)
    assert usage.input_tokens_details.cached_tokens == CACHED and usage.output_tokens_details.reasoning_tokens == 0
    assert response.model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] == generated // 2


def test_the_events_of_a_stream(address, engine):
    """Each of a known kind and numbered; items are added, filled and done in turn; no [DONE] comes after the last."""
    engine.says(f"Hm.</think>{CALLS}", size=2)
    body = {"input": "x", "stream": True, "tools": [WEATHER], "reasoning": {"effort": "low"}}
    *lines, end = httpx2.post(f"{address}/v1/responses", json=body).text.split("\n\n")
    assert end == ""
    events = []
    for line in lines:
        name, data = line.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        EVENTS[events[-1]["type"]].model_validate(events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    text = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    call = ["function_call_arguments.delta", "function_call_arguments.done"]
    expected = ["created", "in_progress"]
    for inner in (["content_part.added", "reasoning_text.delta", "reasoning_text.done", text[3]], text, call, call):
        expected += ["output_item.added", *inner, "output_item.done"]
    assert [kind for place, kind in enumerate(kinds) if kind != kinds[place - 1]] == [*expected, "completed"]
    final = events[-1]["response"]["output"]
    assert [event["item"] for event in events if event["type"].endswith("item.done")] == final
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == final[event["output_index"]]["id"]


CASES = {
    "answer": ("Hello, naïve wörld 日本", {}),
    "nothing": ("", {}),
    "thinking": ("Let me see.</think>\n\nIt is 4.", {"reasoning": {"effort": "high"}}),
    "only thinking": ("Let me see", {"reasoning": {"effort": "high"}}),
    "calls": (CALLS, {"tools": [WEATHER]}),
    "text after a call": (f"{CALLS}\nDone.", {"tools": [WEATHER]}),
    "tags that are not to be used": (CALLS, {"tools": [WEATHER], "tool_choice": "none"}),
    "logprobs": ("Hello, naïve wörld", {"include": [LOGPROBS], "top_logprobs": 2}),
    "logprobs after thinking": ("Hm.</think>\n\nFour", {"include": [LOGPROBS], "reasoning": {"effort": "low"}}),
    "a limit": ("one two three four", {"max_output_tokens": 3}),
    "a limit inside a call": (CALLS, {"tools": [WEATHER], "max_output_tokens": 40}),
}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", CASES)
def test_a_stream_adds_up_to_the_response(client, engine, name, size):
    """However many tokens an update brings; in the last event, and in the deltas as well."""
    text, fields = CASES[name]
    engine.says(text, size=1000)
    whole = ask(client, **fields)
    engine.says(text, size=size)
    events = list(ask(client, stream=True, **fields))
    assert plain(events[-1].response) == plain(whole)
    deltas = {}
    for event in events:
        if event.type.endswith(".delta"):
            text, rows = deltas.get(event.output_index, ("", []))
            deltas[event.output_index] = (text + event.delta, rows + getattr(event, "logprobs", []))
    for place, item in enumerate(whole.output):
        part = None if item.type == "function_call" else item.content[0]
        found = (part.text, getattr(part, "logprobs", None) or []) if part else (item.arguments, [])
        assert [deltas[place][0], [row.to_dict() for row in deltas[place][1]]] == [
            found[0],
            [row.to_dict() for row in found[1]],
        ]


def test_the_clients_own_accumulation(client, engine):
    """Its helper for streams accepts the order of events, and parses what it was promised."""

    class Answer(openai.BaseModel):
        n: int

    engine.says('{"n": 4}', size=2)
    with client.responses.stream(model=MODEL, input="x", text_format=Answer) as stream:
        assert stream.get_final_response().output_parsed == Answer(n=4)
    assert engine.requests[0].matcher is not None


def test_a_round_of_tools(client, engine):
    """The items of a response go back as they are, with outputs; the model sees one reply and its results."""
    engine.says(f"Hm.</think>{CALLS}")
    asked = {"tools": [WEATHER], "reasoning": {"effort": "high"}}
    first = ask(client, **asked)
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"]
    calls = [item for item in first.output if item.type == "function_call"]
    assert json.loads(calls[0].arguments) == {"city": 'Zürich "old"', "days": 3}
    assert calls[0].call_id != calls[1].call_id and calls[0].name == "weather"
    engine.says("Sunny.")
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "sun"} for call in calls]
    outputs[1]["output"] = [{"type": "input_text", "text": "ra"}, {"type": "input_text", "text": "in"}]
    items = [{"role": "user", "content": "Weather?"}, *[item.model_dump() for item in first.output], *outputs]
    assert ask(client, input=items, **asked).output_text == ""
    tools, messages = shown_to(engine)
    function = {name: WEATHER[name] for name in ("name", "description", "parameters")}
    assert tools == [{"type": "function", "function": function}]
    arguments = [{"city": 'Zürich "old"', "days": 3}, {"city": "null"}]
    assert messages == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": given}, "id": call.call_id}
                for call, given in zip(calls, arguments)
            ],
        },
        {"role": "tool", "content": "sun", "tool_call_id": calls[0].call_id},
        {"role": "tool", "content": "rain", "tool_call_id": calls[1].call_id},
    ]


CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
MADE = [{"type": "function", "function": {"name": "f", "arguments": {}}, "id": "c"}]
SAID = {"role": "assistant", "content": "a"}
THOUGHT = {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]}
INPUTS = {
    "plain messages": (
        [{"role": "developer", "content": "d"}, {"role": "user", "content": [{"type": "input_text", "text": "u"}]}],
        [{"role": "system", "content": "d"}, {"role": "user", "content": "u"}],
    ),
    "parts of replies": (
        [{**SAID, "type": "message", "content": [{"type": "output_text", "text": "a", "annotations": []}]}],
        [SAID],
    ),
    "two replies": ([SAID, SAID], [SAID, SAID]),
    "text around a call": ([SAID, CALL, SAID], [{**SAID, "content": "aa", "tool_calls": MADE}]),
    "calls alone": ([CALL, CALL], [{"role": "assistant", "content": "", "tool_calls": MADE * 2}]),
    "a call after a result": (
        [CALL, {"type": "function_call_output", "call_id": "c", "output": "1"}, CALL],
        [
            {"role": "assistant", "content": "", "tool_calls": MADE},
            {"role": "tool", "content": "1", "tool_call_id": "c"},
            {"role": "assistant", "content": "", "tool_calls": MADE},
        ],
    ),
    "thoughts": (
        [THOUGHT, THOUGHT, SAID, THOUGHT, CALL],
        [
            {**SAID, "reasoning_content": "tt"},
            {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": MADE},
        ],
    ),
    "thoughts of others": (
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "encrypted_content": "x"}, SAID],
        [SAID],
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_items_become_messages(client, engine, name):
    """What belongs to one reply is one message, which templates need for calls and their results."""
    items, messages = INPUTS[name]
    ask(client, input=items)
    assert shown_to(engine)[1] == messages


def test_thinking(client, engine):
    """Effort turns it on or, for none, off; it is an item of its own, with a count of its own."""
    text = "Let me see.</think>It is 4."
    engine.says(text)
    response = ask(client, reasoning={"effort": "minimal"})
    reasoning, message = response.output
    assert reasoning.content[0].text == "Let me see." and message.content[0].text == "It is 4."
    thought = len(TOKENIZER.encode("Let me see.</think>"))
    assert response.usage.output_tokens_details.reasoning_tokens == thought
    for fields in ({"reasoning": {"effort": "none"}}, {"reasoning": {"summary": "auto"}}, {}):
        engine.says("4")
        assert [item.type for item in ask(client, **fields).output] == ["message"]


def test_what_a_limit_cuts_is_incomplete(client, engine):
    """The last item, and the response, which says why."""
    engine.says(CALLS)
    response = ask(client, tools=[WEATHER], max_output_tokens=40)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in response.output] == ["completed", "incomplete"]
    assert response.usage.output_tokens == 40


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}},
        {"text": {"format": {"type": "json_object"}}},
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "boolean"}, "strict": True}}},
    ],
)
def test_what_must_come_out_is_enforced(client, engine, fields):
    ask(client, **fields)
    assert engine.requests[0].matcher is not None


def test_logprobs(client, engine):
    """A row for each token of the text, if they are asked for."""
    engine.says("naïve 日本")
    (message,) = ask(client, include=[LOGPROBS], top_logprobs=3).output
    rows = message.content[0].logprobs
    assert b"".join(bytes(row.bytes) for row in rows).decode() == "naïve 日本"
    assert all(row.logprob == -0.5 and len(row.top_logprobs) == 3 for row in rows)
    assert ask(client).output[0].content[0].logprobs == []


def test_fields_reach_the_engine(client, engine):
    """And those that only a server with a memory could use are tolerated."""
    tolerated = {"store": True, "truncation": "auto", "user": "u", "service_tier": "auto", "background": False}
    ask(client, temperature=0, max_output_tokens=7, include=["reasoning.encrypted_content"], **tolerated)
    (request,) = engine.requests
    assert (request.strategy, request.max_tokens, request.samples, request.matcher) == (Greedy(), 7, 1, None)


IMAGE = {"type": "input_image", "image_url": "x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input"),
        ({"input": openai.omit}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0].type"),
        ({"input": [SAID, {"type": "item_reference", "id": "x"}]}, "input[1].type"),
        ({"input": [{**CALL, "arguments": "[]"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": [IMAGE]}]}, "input[0].output[0].type"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**WEATHER, "name": "not a name"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [{**WEATHER, "parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "news"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 7}}}}, "text.format"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": [LOGPROBS], "tools": [WEATHER]}, "include"),
    ],
)
def test_wrong_fields_are_named(client, engine, fields, param):
    """A wrong value of a known field is a 400 whose `param` is its path, and the engine hears nothing of it."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert not engine.requests


def test_errors(client, engine):
    """Before the first event they are statuses; then the response has failed, and says why."""
    with pytest.raises(openai.NotFoundError):
        ask(client, model="gpt-5")
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, input="x y " * 2000)
    assert long.value.code == "context_length_exceeded"
    engine.says("Hello", finish="error", size=1)
    with pytest.raises(openai.InternalServerError):
        ask(client)
    *_, last = ask(client, stream=True)
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    assert last.response.error.message == "the engine failed" and last.response.output_text == "Hello"


def test_a_client_that_leaves_ends_its_request(client, engine):
    engine.says("Hello there", hold=threading.Event())
    with ask(client, stream=True) as stream:
        next(iter(stream))
    wait_until(lambda: engine.cancelled[0] == {0})


BODY = {
    "model": MODEL,
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
        THOUGHT,
        CALL,
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ],
    "instructions": "i",
    "tools": [WEATHER],
    "tool_choice": {"type": "function", "name": "weather"},
    "text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "integer"}}},
    "reasoning": {"effort": "low"},
    "include": [LOGPROBS],
    "top_logprobs": 1,
    "max_output_tokens": 5,
    "stream": True,
}


@settings(PATIENT, max_examples=200)
@given(mutated([("/v1/responses", BODY)]))
def test_whatever_is_sent_is_answered(app_client, engine, sent):
    """Never a fault of ours: a response, or an error of the known form."""
    engine.says("4")
    route, data = sent
    reply = app_client.post(route, content=data, headers={"Content-Type": "application/json"})
    if reply.headers["content-type"].startswith("text/event-stream"):
        last = json.loads(reply.text.split("\n\n")[-2].partition("data: ")[2])
        assert last["type"] in ("response.completed", "response.incomplete")
    elif reply.status_code != 200:
        assert reply.status_code in (400, 404) and len(reply.content) < 2000
        assert {*reply.json()["error"]} == {"message", "type", "param", "code"}
