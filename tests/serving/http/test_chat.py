"""Chat completions as the official client sees them, with an engine whose answers are known."""

import json
import threading

import httpx2
import numpy as np
import openai
import pytest

from mimo_jax.decode.sampling import Greedy, Sampled
from mimo_jax.errors import UserError
from mimo_jax.serving.requests import Busy
from tests.serving.http.scripted import CACHED, STOP, TOKENIZER, wait_until

MODEL = "xiaomi/mimo"
ASK = [{"role": "user", "content": "Say hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
CALLS = (
    'Let me look.<tool_call>\n<function=weather>\n<parameter=city>Zürich "old"</parameter>\n'
    "<parameter=days>3</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=weather>\n<parameter=city>null</parameter>\n</function>\n</tool_call>"
)


def ask(client, **fields):
    return client.chat.completions.create(**{"model": MODEL, "messages": ASK, **fields})


def joined(chunks) -> dict[int, dict]:
    """What a client makes of a stream: by choice its texts, calls, rows and finish."""
    found: dict[int, dict] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            own = found.setdefault(
                choice.index, {"content": "", "reasoning": "", "calls": [], "rows": [], "finish": None}
            )
            delta = choice.delta
            own["content"] += delta.content or ""
            own["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or []:
                if call.id:
                    assert call.index == len(own["calls"]) and call.type == "function"
                    own["calls"].append([call.function.name, call.function.arguments])
                else:
                    own["calls"][call.index][1] += call.function.arguments
            own["rows"] += choice.logprobs.content if choice.logprobs else []
            own["finish"] = choice.finish_reason or own["finish"]
    return found


def plain(choice) -> dict:
    """The same of a whole reply."""
    message = choice.message
    return {
        "content": message.content or "",
        "reasoning": getattr(message, "reasoning_content", None) or "",
        "calls": [[call.function.name, call.function.arguments] for call in message.tool_calls or []],
        "rows": choice.logprobs.content if choice.logprobs else [],
        "finish": choice.finish_reason,
    }


def test_a_reply(client, engine):
    """The prompt is what the template makes of the messages, the reply the text, and all tokens are counted."""
    engine.says("Hello, wörld!")
    reply = ask(client)
    (request,) = engine.requests
    assert TOKENIZER.backend.decode(list(request.prompt), skip_special_tokens=False) == (
        "<|im_start|>user\nSay hello<|im_end|><|im_start|>assistant\n<think></think>"
    )
    assert reply.choices[0].message.content == "Hello, wörld!"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.tool_calls is None and reply.choices[0].logprobs is None
    assert (reply.object, reply.model, reply.id[:9]) == ("chat.completion", MODEL, "chatcmpl-")
    usage, generated = reply.usage, len(TOKENIZER.encode("Hello, wörld!")) + 1
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(request.prompt), generated)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == CACHED
    assert usage.completion_tokens_details.accepted_prediction_tokens is None
    drafting = reply.model_extra["metrics"]["speculative_decoding"]
    rounds = generated // 2
    assert drafting["num_spec_steps"] == rounds and drafting["num_draft_tokens"] == 2 * rounds
    assert drafting["num_accepted_draft_tokens"] == rounds + rounds // 2
    assert drafting["mean_acceptance_length"] == (generated - 1) / rounds


def test_the_chunks_of_a_stream(address, engine):
    """Role, contents, finish, usage, [DONE], each in a chunk of its own and under one id."""
    engine.says("one two three four", size=2)
    body = {"messages": ASK, "stream": True, "stream_options": {"include_usage": True}}
    reply = httpx2.post(f"{address}/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache" and reply.headers["x-accel-buffering"] == "no"
    *lines, done, end = reply.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    first, *middle, last, usage = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(middle) > 1 and all([*chunk["choices"][0]["delta"]] == ["content"] for chunk in middle)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "one two three four"
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert (
        usage["choices"] == []
        and usage["usage"]["completion_tokens"] == len(TOKENIZER.encode("one two three four")) + 1
    )
    assert "speculative_decoding" in usage["metrics"]
    chunks = [first, *middle, last, usage]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize("asked", [{"messages": ASK}, {"prompt": "a"}])
def test_tokens_are_counted_all_along_where_it_is_asked_for(app_client, engine, asked):
    """What vLLM has: a chunk holds several tokens, and says how many there are by now."""
    engine.says("one two three four five six", size=2)
    options = {"include_usage": True, "continuous_usage_stats": True}
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    reply = app_client.post(path, json={**asked, "stream": True, "stream_options": options})
    *lines, _, _ = reply.text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    rounds = [chunk["metrics"]["speculative_decoding"]["num_spec_steps"] for chunk in chunks if "metrics" in chunk]
    assert rounds[0] == 1 and rounds == sorted(rounds) and len(rounds) > 2
    total = len(TOKENIZER.encode("one two three four five six")) + 1
    assert counts == sorted(counts) and {2, 4, total} <= {*counts}
    assert counts[-1] == total


def test_without_usage_no_chunk_is_without_choices(client, engine):
    """Clients look at the first choice of every chunk."""
    chunks = list(ask(client, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


TEXTS = {
    "answer": ("Hello, naïve wörld 日本", {}),
    "thinking": ("Let me see.</think>\n\nIt is 4.", {"reasoning_effort": "high"}),
    "only thinking": ("Let me see", {"reasoning_effort": "high"}),
    "calls": (CALLS, {"tools": [WEATHER]}),
    "a call after thinking": (
        "Hm." + CALLS.replace("Let me look.", ""),
        {"tools": [WEATHER], "reasoning_effort": "low"},
    ),
    "tags without tools": (CALLS, {}),
    "tags that are not to be used": (CALLS, {"tools": [WEATHER], "tool_choice": "none"}),
    "a stop string": ("one, two and three", {"stop": [" and", "never"]}),
    "logprobs": ("Hello, naïve wörld", {"logprobs": True, "top_logprobs": 2}),
    "logprobs up to a stop string": ("one, two and three", {"logprobs": True, "stop": "o and th"}),
    "logprobs after thinking": ("Hm.</think>Four", {"logprobs": True, "reasoning_effort": "high"}),
    "a limit inside a call": (CALLS, {"tools": [WEATHER], "max_tokens": 40}),
}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", TEXTS)
def test_a_stream_adds_up_to_the_reply(client, engine, name, size):
    """However many tokens an update brings."""
    text, fields = TEXTS[name]
    engine.says(text, size=1000)
    whole = ask(client, **fields)
    engine.says(text, size=size)
    assert joined(ask(client, stream=True, **fields)) == {0: plain(whole.choices[0])}


def test_thinking_is_not_content(client, engine):
    """It has its own field and its own count, wherever it was asked for or the model began it."""
    text = "Let me see.</think>It is 4."
    thought = len(TOKENIZER.encode("Let me see.</think>"))
    ways = [
        {"reasoning_effort": "minimal"},
        {"extra_body": {"thinking": {"type": "enabled"}}},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}, "reasoning_effort": "none"},
    ]
    for fields in ways:
        engine.says(text)
        reply = ask(client, **fields)
        assert plain(reply.choices[0])["reasoning"] == "Let me see."
        assert reply.choices[0].message.content == "It is 4."
        assert reply.usage.completion_tokens_details.reasoning_tokens == thought
    engine.says("<think>" + text)
    begun = ask(client, reasoning_effort="none")
    assert plain(begun.choices[0])["reasoning"] == "Let me see."
    assert begun.usage.completion_tokens_details.reasoning_tokens == thought + 1
    engine.says("4")
    assert ask(client).usage.completion_tokens_details.reasoning_tokens == 0


def test_calls_of_tools(client, engine):
    """Names, arguments by their types, ids that differ, and the finish that agents branch on."""
    engine.says(CALLS)
    reply = ask(client, tools=[WEATHER])
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    first, second = choice.message.tool_calls
    assert json.loads(first.function.arguments) == {"city": 'Zürich "old"', "days": 3}
    assert json.loads(second.function.arguments) == {"city": "null"}
    assert first.id.startswith("call_") and first.id != second.id
    assert '"name": "weather"' in TOKENIZER.decode(engine.requests[0].prompt)
    assert engine.requests[0].matcher is None


def test_tools_that_are_not_to_be_called_are_not_shown(client, engine):
    ask(client, tools=[WEATHER], tool_choice="none")
    assert "weather" not in TOKENIZER.decode(engine.requests[0].prompt)


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({"tools": [WEATHER], "tool_choice": "required"}, "<tool_call>"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "<tool_call>"),
        ({"response_format": {"type": "json_object"}}, "{"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "boolean"}}}},
            "true",
        ),
        ({"response_format": {"type": "json_object"}, "tools": [WEATHER]}, "{"),
        ({"response_format": {"type": "json_object"}, "tools": [WEATHER]}, "<tool_call>"),
    ],
)
def test_grammars_reach_the_engine(client, engine, service, fields, begins):
    """What must come out is enforced: its first token is allowed, and a word is not. Beside tools both may begin."""
    ask(client, **fields)
    mask = np.zeros((1, -(-service.vocab_size // 32)), np.uint32)
    engine.requests[0].matcher().masks([], mask)
    allowed = lambda text: bool(mask[0, (t := TOKENIZER.encode(text)[0]) >> 5] >> (t & 31) & 1)  # noqa: E731
    assert allowed(begins) and not allowed("Hello")


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_where_only_one_may_be(client, engine, stream):
    """`parallel_tool_calls: false`: what follows a call is not shown, and the engine is told to write no more."""
    call = "<tool_call>\n<function=weather>\n<parameter=city>Rome</parameter>\n</function>\n</tool_call>"
    engine.says(f"Well. {call}\n{call}\nDone.", hold=threading.Event())
    reply = ask(client, tools=[WEATHER], parallel_tool_calls=False, stream=stream)
    found = joined(reply)[0] if stream else plain(reply.choices[0])
    assert found["content"].strip() == "Well." and found["finish"] == "tool_calls"
    assert found["calls"] == [["weather", '{"city": "Rome"}']]
    assert engine.cancelled[0] == {0}


def test_choices(client, engine):
    """n texts, in their order, of one prompt that counts once."""
    engine.says("zero", "one", "two")
    for fields in ({}, {"stop": "never"}):
        reply = ask(client, n=3, **fields)
        assert [choice.message.content for choice in reply.choices] == ["zero", "one", "two"]
        assert reply.usage.prompt_tokens == len(engine.requests[-1].prompt)
    found = joined(ask(client, n=3, stream=True))
    assert {index: own["content"] for index, own in found.items()} == {0: "zero", 1: "one", 2: "two"}


def test_logprobs(client, engine):
    """A row for each token of the content, whose bytes add up to it; the most likely ones beside it."""
    engine.says("naïve 日本")
    rows = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert b"".join(bytes(row.bytes) for row in rows).decode() == "naïve 日本"
    assert all(row.logprob == -0.5 and len(row.top_logprobs) == 3 for row in rows)
    assert all(row.top_logprobs[0].token == row.token for row in rows)
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        ask(client, top_logprobs=3)


def test_a_stop_string_ends_the_work(client, engine):
    """Even inside a token: what comes after is neither shown nor counted, and the engine is told."""
    text = "".join(f" {number}" for number in range(60))
    engine.says(text, size=1, hold=threading.Event())
    reply = ask(client, stop="1 12", n=2)
    for choice in reply.choices:
        assert choice.message.content == text[: text.index("1 12")] and choice.finish_reason == "stop"
    assert engine.cancelled[0] == {0, 1}
    assert reply.usage.completion_tokens < 2 * len(TOKENIZER.encode(text[: text.index("13")]))


FIELDS = {
    "temperature": ({"temperature": 0.3}, {"strategy": Sampled(0.3, top_p=0.95)}),
    "greedy": ({"temperature": 0, "top_p": 0.5}, {"strategy": Greedy()}),
    "filters": (
        {"top_p": 1, "extra_body": {"top_k": 5, "min_p": 0.1}},
        {"strategy": Sampled(0.8, top_p=1, top_k=5, min_p=0.1)},
    ),
    "no filter": ({"extra_body": {"top_k": -1}}, {"strategy": Sampled(0.8, top_p=0.95)}),
    "nothing": ({}, {"strategy": Sampled(0.8, top_p=0.95), "stop_ids": (STOP,), "samples": 1, "matcher": None}),
    "seed": ({"seed": 7}, {"seed": 7}),
    "a large seed": ({"seed": -1}, {"seed": 2**32 - 1}),
    "penalties": (
        {"presence_penalty": 1, "frequency_penalty": -0.5},
        {"presence_penalty": 1.0, "frequency_penalty": -0.5},
    ),
    "bias": ({"logit_bias": {"17": -100, "4095": 3.5}}, {"logit_bias": {17: -100.0, 4095: 3.5}}),
    "stop tokens": ({"extra_body": {"stop_token_ids": [5]}}, {"stop_ids": (STOP, 5)}),
    "no end": ({"extra_body": {"ignore_eos": True}}, {"stop_ids": ()}),
    "limit": ({"max_tokens": 9}, {"max_tokens": 9}),
    "both limits": ({"max_tokens": 9, "max_completion_tokens": 11}, {"max_tokens": 11}),
    "time": ({"extra_body": {"timeout": 2.5}}, {"seconds": 2.5}),
    "null is absent": ({"extra_body": {"temperature": None, "stop": None, "n": None}}, {"samples": 1}),
    "unknown": ({"extra_body": {"what": {"is": "this"}}}, {"samples": 1}),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_reach_the_engine(client, engine, name):
    """What a body names replaces the default, and nothing else does."""
    fields, expected = FIELDS[name]
    ask(client, **fields)
    (request,) = engine.requests
    assert {field: getattr(request, field) for field in expected} == expected


def test_the_context_is_the_limit(client, engine):
    """A limit beyond it is as good as none, and seeds differ from request to request."""
    for fields in ({}, {"max_tokens": 10_000}):
        ask(client, **fields)
        assert engine.requests[-1].max_tokens == 500 - len(engine.requests[-1].prompt)
    first, second = engine.requests
    assert first.seed != second.seed


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": True}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids"),
        ({"extra_body": {"stop_token_ids": [*range(17)]}}, "stop_token_ids"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"stream_options": {"include_usage": 1}}}, "stream_options.include_usage"),
        ({"extra_body": {"thinking": {"type": "maybe"}}}, "thinking.type"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": "no"}}}, "chat_template_kwargs.enable_thinking"),
        ({"tools": [{"type": "function", "function": {"name": "not a name"}}]}, "tools[0].function.name"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "news"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}, "response_format"),
    ],
)
def test_wrong_fields_are_named(client, engine, fields, param):
    """A wrong value of a known field is a 400 whose `param` is its path, and the engine hears nothing of it."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert not engine.requests


def test_errors_are_those_that_clients_expect(client, engine):
    """By their classes, and by the codes that agents branch on."""
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-5")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, messages=[{"role": "user", "content": "x y " * 600}])
    assert long.value.code == "context_length_exceeded"
    engine.says("", error=Busy("the server is full"))
    with pytest.raises(openai.InternalServerError) as full:
        ask(client, stream=True)
    assert full.value.status_code == 503 and "retry-after" in full.value.response.headers
    engine.says("", error=UserError("request: no"))
    with pytest.raises(openai.BadRequestError, match="request: no"):
        ask(client)
    engine.says("Hel", finish="error")
    with pytest.raises(openai.InternalServerError):
        ask(client)


def test_errors_after_the_beginning_end_the_stream(client, engine):
    """Its status is sent by then; the client raises all the same."""
    engine.says("Hello", finish="error", size=1)
    seen = []
    with pytest.raises(openai.APIError, match="the engine failed"):
        for chunk in ask(client, stream=True):
            seen.append(chunk)
    assert joined(seen)[0] == {"content": "Hello", "reasoning": "", "calls": [], "rows": [], "finish": None}


def test_deadlines(client, engine):
    """What there is by then is the answer; if there is nothing, that is an error, which clients try again."""
    engine.says("Hello", finish="deadline")
    assert ask(client).choices[0].finish_reason == "length"
    engine.says("", finish="deadline")
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client)
    assert caught.value.status_code == 408


def test_a_client_that_leaves_ends_its_request(client, engine):
    """In the middle of a stream, and while it waits for a whole reply."""
    engine.says("Hello there", hold=threading.Event())
    with ask(client, stream=True, n=2) as stream:
        next(iter(stream))
    wait_until(lambda: engine.cancelled[0] == {0, 1})
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.3))
    wait_until(lambda: engine.cancelled[1] == {0})
