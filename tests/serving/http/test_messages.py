"""Anthropic's messages as its official client sees them, with an engine whose answers are known."""

import json
import threading

import anthropic
import httpx2
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings

from mimo_jax.decode.sampling import Sampled
from mimo_jax.serving.http.app import AppOptions, create_app
from mimo_jax.serving.requests import Busy
from tests.serving.http.mutations import PATIENT, mutated
from tests.serving.http.scripted import (
    CACHED,
    PLAIN_TEMPLATE,
    TOKENIZER,
    ScriptedEngine,
    make_service,
    models_of,
    serving,
    shown_to,
    wait_until,
)
from tests.serving.http.test_chat import CALLS, MODEL

ASK = [{"role": "user", "content": "Say hello"}]
WEATHER = {
    "name": "weather",
    "description": "Today's",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
THINK = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
EVENTS = models_of(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def service(module_engine):
    service = make_service(module_engine, PLAIN_TEMPLATE)
    service.context = 2000
    return service


@pytest.fixture(scope="module")
def client(address):
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def ask(client, **fields):
    return client.messages.create(**{"model": MODEL, "messages": ASK, "max_tokens": 1000, **fields})


def plain(message) -> dict:
    """What a message says, without what differs from one to the next."""
    found = message.to_dict(exclude_none=True)
    for block in [found, *found["content"]]:
        block.pop("id", None)
    return found


def test_a_message(client, engine):
    """Text and reason; tokens from the cache are no input."""
    engine.says("Hello, wörld!")
    message = ask(client, system="Be kind.")
    Message.model_validate(message.model_dump())
    assert shown_to(engine) == ([], [{"role": "system", "content": "Be kind."}, *ASK])
    assert [(block.type, block.text) for block in message.content] == [("text", "Hello, wörld!")]
    assert (message.id[:4], message.type, message.role, message.model) == ("msg_", "message", "assistant", MODEL)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage, prompt = message.usage, len(engine.requests[0].prompt)
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (prompt - CACHED, CACHED)
    assert usage.output_tokens == len(TOKENIZER.encode("Hello, wörld!")) + 1
    assert usage.cache_creation_input_tokens == 0


def test_the_events_of_a_stream(address, engine):
    """Each of a known kind; blocks start, grow and stop in turn."""
    engine.says(f"Hm.</think>{CALLS}", size=2)
    body = {"messages": ASK, "max_tokens": 500, "stream": True, "tools": [WEATHER], **THINK}
    *lines, end = httpx2.post(f"{address}/v1/messages", json=body).text.split("\n\n")
    assert end == ""
    events = []
    for line in lines:
        name, data = line.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] == "ping":
            continue
        events.append(EVENTS[event["type"]].model_validate(event))
    blocks = [("thinking", "thinking_delta"), ("text", "text_delta"), *[("tool_use", "input_json_delta")] * 2]
    expected = ["message_start"]
    for index, (kind, delta) in enumerate(blocks):
        expected += [(index, kind), (index, delta), (index, "content_block_stop")]
    seen = []
    for event in events:
        inner = getattr(event, "content_block", None) or getattr(event, "delta", None)
        kind = event.type if event.type.startswith("message") else (event.index, getattr(inner, "type", event.type))
        seen += [kind] if seen[-1:] != [kind] else []
    assert seen == [*expected, "message_delta", "message_stop"]


CASES = {
    "answer": ("Hello, naïve wörld 日本", {}),
    "nothing": ("", {}),
    "thinking": ("Let me see.</think>\n\nIt is 4.", THINK),
    "only thinking": ("Let me see", THINK),
    "calls": (CALLS, {"tools": [WEATHER]}),
    "text after a call": (f"{CALLS}\nDone.", {"tools": [WEATHER]}),
    "tags that are not to be used": (CALLS, {"tools": [WEATHER], "tool_choice": {"type": "none"}}),
    "a stop string": ("one, two and three", {"stop_sequences": [" and", "never"]}),
    "stop strings in each other": ("one, two and three", {"stop_sequences": ["two and", "wo"]}),
    "a stop string in a call": (CALLS, {"tools": [WEATHER], "stop_sequences": ["old"]}),
    "a limit": ("one two three four", {"max_tokens": 3}),
    **{f"a limit at {n}": (CALLS, {"tools": [WEATHER], "max_tokens": n}) for n in range(10, 60, 6)},
}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", CASES)
def test_a_stream_adds_up_to_the_message(client, engine, name, size):
    """As the client itself adds it up, however many tokens an update brings, whatever is cut off."""
    text, fields = CASES[name]
    engine.says(text, size=1000)
    whole = ask(client, **fields)
    engine.says(text, size=size)
    with client.messages.stream(model=MODEL, messages=ASK, **{"max_tokens": 1000, **fields}) as stream:
        found = stream.get_final_message()
    assert plain(found) == plain(whole)


def test_why_it_ended(client, engine):
    """By the word that agents branch on, and by the stop string that was found."""
    engine.says("one, two and three")
    ended = ask(client, stop_sequences=["never", "two"])
    assert (ended.stop_reason, ended.stop_sequence, ended.content[0].text) == ("stop_sequence", "two", "one, ")
    assert ask(client, max_tokens=3).stop_reason == "max_tokens"
    engine.says(CALLS)
    called = ask(client, tools=[WEATHER])
    assert (called.stop_reason, called.stop_sequence) == ("tool_use", None)


def test_a_round_of_tools(client, engine):
    """The blocks of a reply go back as they are, with results; the model sees one reply, its results and the rest."""
    engine.says(f"Hm.</think>{CALLS}")
    asked = {"tools": [WEATHER], **THINK}
    reply = ask(client, **asked)
    assert [block.type for block in reply.content] == ["thinking", "text", "tool_use", "tool_use"]
    first, second = reply.content[2:]
    assert first.input == {"city": 'Zürich "old"', "days": 3} and second.input == {"city": "null"}
    assert first.name == "weather" and first.id.startswith("toolu_") and first.id != second.id
    results = [
        {"type": "tool_result", "tool_use_id": first.id, "content": "sun", "cache_control": {"type": "ephemeral"}},
        {"type": "tool_result", "tool_use_id": second.id, "content": [{"type": "text", "text": "rain"}]},
        {"type": "text", "text": "So?"},
    ]
    engine.says("Sunny.</think>Yes")
    said = [*ASK, {"role": "assistant", "content": reply.content}, {"role": "user", "content": results}]
    assert ask(client, messages=said, **asked).content[-1].text == "Yes"
    tools, messages = shown_to(engine)
    function = {"name": "weather", "description": "Today's", "parameters": WEATHER["input_schema"]}
    assert tools == [{"type": "function", "function": function}]
    call = lambda block: {"name": "weather", "arguments": block.input}  # noqa: E731
    assert messages == [
        *ASK,
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"type": "function", "function": call(one), "id": one.id} for one in (first, second)],
        },
        {"role": "tool", "content": "sun", "tool_call_id": first.id},
        {"role": "tool", "content": "rain", "tool_call_id": second.id},
        {"role": "user", "content": "So?"},
    ]


def test_the_system_prompt(client, engine):
    """Of all blocks but the one that differs each time; such messages among others stay in their places."""
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.37.0d9; cch=fa690;"}
    parts = [billing, {"type": "text", "text": "You are "}, {"type": "text", "text": "kind."}]
    said = [*ASK, {"role": "system", "content": "9 tokens left"}]
    ask(client, system=parts, messages=said)
    assert shown_to(engine)[1] == [{"role": "system", "content": "You are kind."}, *said]
    ask(client, system=[billing])
    assert shown_to(engine)[1] == ASK


def test_thinking(client, engine):
    """On and off as it is asked for; a block of its own."""
    engine.says("Let me see.</think>It is 4.")
    for fields in (THINK, {"thinking": {"type": "adaptive"}}):
        thinking, text = ask(client, **fields).content
        assert (thinking.type, thinking.thinking, text.text) == ("thinking", "Let me see.", "It is 4.")
    engine.says("4")
    for fields in ({"thinking": {"type": "disabled"}}, {}):
        assert [block.type for block in ask(client, **fields).content] == ["text"]


def test_tokens_are_counted(client, engine):
    """As many as a message with the same fields is charged for."""
    fields = {"system": "Be kind.", "tools": [WEATHER], **THINK}
    count = client.messages.count_tokens(model=MODEL, messages=ASK, **fields)
    usage = ask(client, **fields).usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    with pytest.raises(anthropic.BadRequestError, match="messages is missing"):
        client.messages.count_tokens(model=MODEL, messages=anthropic.omit)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "boolean"}}}},
    ],
)
def test_what_must_come_out_is_enforced(client, engine, fields):
    ask(client, **fields)
    assert engine.requests[0].matcher is not None


def test_fields_reach_the_engine(client, engine):
    """And those that say nothing to it are tolerated."""
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "what": 1}  # which this client knows no more
    ask(client, extra_body=fields, max_tokens=9, metadata={"user_id": "u"}, service_tier="auto")
    (request,) = engine.requests
    assert (request.strategy, request.max_tokens) == (Sampled(0.5, top_p=0.9, top_k=7), 9)
    assert request.samples == 1 and request.matcher is None


def user(*blocks):
    return {"messages": [{"role": "user", "content": list(blocks)}]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
RESULT = {"type": "tool_result", "tool_use_id": "t"}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_tokens": anthropic.omit}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [*ASK, {"role": "assistant", "content": "It is"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (user(IMAGE), "messages[0].content[0].type"),
        (user({"type": "document", "source": {}}), "messages[0].content[0].type"),
        (user({"type": "tool_use", "id": "t", "name": "f", "input": {}}), "messages[0].content[0].type"),
        (user({**RESULT, "content": [IMAGE]}), "messages[0].content[0].content[0].type"),
        (user("x"), "messages[0].content[0]"),
        ({"system": [IMAGE]}, "system[0].type"),
        ({"extra_body": {"temperature": "hot"}}, "temperature"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "name": "not a name"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
        ({"tool_choice": {"type": "always"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "news"}}, "tool_choice"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 7}}}}, "output_config.format"),
    ],
)
def test_wrong_fields_are_named(client, engine, fields, path):
    """In this API's form, which has no field for it, so in the message; and the engine hears nothing of it."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, **fields)
    error = caught.value.body["error"]
    assert caught.value.body["type"] == "error" and {*error} == {"type", "message"}
    assert error["type"] == "invalid_request_error" and error["message"].startswith(path), error["message"]
    assert not engine.requests


def test_errors(client, engine, address):
    """By their classes, and by what agents look for in them; also in a stream, and from what stands before routes."""
    with pytest.raises(anthropic.NotFoundError):
        ask(client, model="claude-3")
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        ask(client, messages=[{"role": "user", "content": "x y " * 2000}])
    engine.says("", error=Busy("the server is full"))
    with pytest.raises(anthropic.InternalServerError) as full:
        ask(client, stream=True)
    assert full.value.status_code == 503 and full.value.body["error"]["type"] == "overloaded_error"
    engine.says("Hello", finish="error", size=1)
    with pytest.raises(anthropic.InternalServerError) as failed:
        ask(client)
    assert failed.value.body["error"] == {"type": "api_error", "message": "the engine failed"}
    seen = []
    with pytest.raises(anthropic.APIStatusError, match="the engine failed"):
        for event in ask(client, stream=True):
            seen += [event.delta.text] if event.type == "content_block_delta" else []
    assert "".join(seen) == "Hello"
    wrong = httpx2.post(f"{address}/v1/messages", content="x").json()
    assert wrong["type"] == "error" and wrong["error"]["type"] == "invalid_request_error"


def test_keys():
    """The client's own header is one of those by which accounts are known."""
    service = make_service(ScriptedEngine(), PLAIN_TEMPLATE)
    with serving(create_app(service, AppOptions({"ann": "secret"}))) as address:
        with anthropic.Anthropic(base_url=address, api_key="secret", max_retries=0) as client:
            ask(client)
        assert service.engine.requests[0].account == "ann"
        with anthropic.Anthropic(base_url=address, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                ask(client)
    assert caught.value.body["error"]["type"] == "authentication_error"


def test_a_client_that_leaves_ends_its_request(client, engine):
    engine.says("Hello there", hold=threading.Event())
    with ask(client, stream=True) as stream:
        next(iter(stream))
    wait_until(lambda: engine.cancelled[0] == {0})


BODY = {
    "model": MODEL,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        *ASK,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": ""},
                {"type": "text", "text": "x"},
                {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "x"}},
            ],
        },
        *user({**RESULT, "content": [{"type": "text", "text": "r"}]}, {"type": "text", "text": "x"})["messages"],
    ],
    "max_tokens": 5,
    "stop_sequences": ["x"],
    "tools": [WEATHER],
    "tool_choice": {"type": "tool", "name": "weather"},
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "integer"}}},
    "stream": True,
    **THINK,
}


@settings(PATIENT, max_examples=200)
@given(mutated([("/v1/messages", BODY), ("/v1/messages/count_tokens", BODY)]))
def test_whatever_is_sent_is_answered(app_client, engine, sent):
    """Never a fault of ours: a message, or an error of the known form."""
    engine.says("4")
    route, data = sent
    reply = app_client.post(route, content=data, headers={"Content-Type": "application/json"})
    if reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.split("\n\n")[-2].startswith("event: message_stop\n")
    elif reply.status_code != 200:
        assert reply.status_code in (400, 404) and len(reply.content) < 2000
        assert {*reply.json()["error"]} == {"type", "message"}
