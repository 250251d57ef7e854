"""The app around the routes that generate: what else it answers, and what it does with clients that misbehave."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading

import httpx2
import openai
import pytest
from hypothesis import given, settings
from starlette.testclient import TestClient

from mimo_jax.serving.http import sse, turn
from mimo_jax.serving.http.app import AppOptions, create_app
from mimo_jax.serving.http.limits import LimitOptions
from tests.serving.http.mutations import PATIENT, mutated
from tests.serving.http.scripted import STATS, TEMPLATE, TOKENIZER, ScriptedEngine, make_service, serving, wait_until

ASK = {"messages": [{"role": "user", "content": "Say hello"}]}


def test_models(client, service):
    """The one model, by a name with a slash in it."""
    (listed,) = client.models.list().data
    found = client.models.retrieve("xiaomi/mimo")
    assert listed == found and (found.id, found.object) == ("xiaomi/mimo", "model")
    assert found.model_extra["max_model_len"] == service.context
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_tokens_of_texts_and_conversations(client, engine, app_client):
    """There and back; and as many as a chat with the same body is charged for."""
    text = "<|im_start|>naïve 日本"
    found = app_client.post("/tokenize", json={"prompt": text}).json()
    assert found["tokens"] == TOKENIZER.encode(text) and found["count"] == len(found["tokens"])
    assert app_client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    asked = {**ASK, "reasoning_effort": "high"}
    count = app_client.post("/tokenize", json=asked).json()["count"]
    assert count == client.chat.completions.create(model="xiaomi/mimo", **asked).usage.prompt_tokens
    for body in ({}, {"prompt": "a", "content": "b"}, {"prompt": 3}):
        assert app_client.post("/tokenize", json=body).json()["error"]["param"] == "prompt"
    assert app_client.post("/detokenize", json={"tokens": [9999]}).json()["error"]["param"] == "tokens"


def test_health(app_client, engine, service):
    """What load balancers ask: dead, stuck and closing servers get no more work."""
    assert (app_client.get("/health").status_code, app_client.get("/health").json()) == (200, {"status": "ok"})
    for change in ({"is_alive": False}, {"idle_seconds": 31.0}):
        engine.stats_now = dataclasses.replace(STATS, **change)
        assert app_client.get("/health").status_code == 503
    engine.stats_now = STATS
    service.is_draining = True
    try:
        assert app_client.get("/health").status_code == 503
        refused = app_client.post("/v1/chat/completions", json=ASK)
        assert refused.status_code == 503 and refused.json()["error"]["type"] == "overloaded_error"
    finally:
        service.is_draining = False


def test_metrics(app_client, engine):
    """Requests that end are seen by their durations, whoever reads them, and refusals by their reasons."""
    engine.says("one two three")
    before = app_client.get("/metrics").text
    app_client.post("/v1/chat/completions", json={**ASK, "n": 2})
    app_client.post("/v1/completions", json={"prompt": "x " * 600})
    after = app_client.get("/metrics").text

    def value(text: str, name: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith(f"mimo:{name}")]
        return float(lines[0].split()[-1]) if lines else 0

    count = "request_generation_tokens_count"
    assert value(after, count) - value(before, count) == 2
    rejected = 'admission_rejections_total{model_name="xiaomi/mimo",reason="too_long"}'
    assert value(after, rejected) - value(before, rejected) == 1
    assert 'model_name="xiaomi/mimo"' in after


def test_wrong_routes_and_methods(app_client):
    """Errors of the framework have the form of all others."""
    for response, status in [
        (app_client.get("/v2/chat"), 404),
        (app_client.get("/v1/chat/completions"), 405),
        (app_client.post("/health", json={}), 405),
    ]:
        assert response.status_code == status
        assert {*response.json()["error"]} == {"message", "type", "param", "code"}


def test_faults_are_errors_like_others(address, engine, monkeypatch, caplog):
    """A fault of ours is a 500 without a word of it; the log has it, once."""
    monkeypatch.setattr(engine, "submit", lambda *_: 1 / 0)
    response = httpx2.post(f"{address}/v1/chat/completions", json=ASK)
    assert response.status_code == 500 and "division" not in response.text
    assert response.json()["error"]["type"] == "server_error"
    wait_until(lambda: "Exception in ASGI application" in caplog.text)
    assert caplog.text.count("ZeroDivisionError: division by zero") == 1


def test_keys_and_origins():
    """Only listed keys are served, and only listed pages' scripts may read."""
    service = make_service(ScriptedEngine(), TEMPLATE)
    client = TestClient(create_app(service, AppOptions({"ann": "secret"}, ["https://a.example"])))
    page = {"Origin": "https://a.example"}
    refused = client.post("/v1/chat/completions", json=ASK, headers=page)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == page["Origin"]
    key = {"Authorization": "Bearer secret"}
    assert client.post("/v1/chat/completions", json=ASK, headers=key).status_code == 200
    assert service.engine.requests[0].account == "ann"
    assert client.get("/metrics").status_code == 401 and client.get("/health").status_code == 200
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert client.options("/v1/chat/completions", headers={**page, **ask}).status_code == 200
    other = client.options("/v1/chat/completions", headers={"Origin": "https://b.example", **ask})
    assert "access-control-allow-origin" not in other.headers


def test_without_a_key_nobody_takes_a_place():
    """However many strangers hold their bodies back, who has a key is served."""
    options = AppOptions({"ann": "secret"}, limits=LimitOptions(concurrency=1))
    with serving(create_app(make_service(ScriptedEngine(), TEMPLATE), options)) as address:
        host, port = address.removeprefix("http://").split(":")
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
        )
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stranger = stack.enter_context(socket.create_connection((host, int(port))))
                stranger.sendall(head + b"\r\n")
                assert stranger.recv(1000).startswith(b"HTTP/1.1 401")
            key = {"Authorization": "Bearer secret"}
            assert httpx2.post(f"{address}/v1/chat/completions", json=ASK, headers=key).status_code == 200


CHAT = {
    **ASK,
    "model": "xiaomi/mimo",
    "max_tokens": 5,
    "stop": ["x"],
    "logit_bias": {"5": 1},
    "logprobs": True,
    "top_logprobs": 1,
    "n": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}},
    "chat_template_kwargs": {"enable_thinking": True, "tools": 3},
    "thinking": {"type": "enabled"},
    "stream": True,
    "stream_options": {"include_usage": True},
}
COMPLETION = {
    "prompt": ["a", "b"],
    "logprobs": 1,
    "echo": False,
    "stop_token_ids": [3],
    "min_p": 0.1,
    "top_k": 2,
    "seed": 1,
}
BODIES = [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION), ("/tokenize", CHAT)]


@settings(PATIENT, max_examples=300)
@given(mutated(BODIES))
def test_whatever_is_sent_is_answered(app_client, engine, sent):
    """Never a fault of ours: a reply, or an error of the known form that says little and echoes less."""
    engine.says("4")
    route, data = sent
    response = app_client.post(route, content=data, headers={"Content-Type": "application/json"})
    if response.headers["content-type"].startswith("text/event-stream"):
        last = response.text.split("\n\n")[-2].removeprefix("data: ")
        assert last == "[DONE]"
        return
    body = response.json()
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        assert {*body} == {"error"} and {*body["error"]} == {"message", "type", "param", "code"}
        assert len(response.content) < 2000


def asgi(app, body: dict, send) -> asyncio.Task:
    """Calls the app as a server does, for a client that never leaves."""
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json")]
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}
    first = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive():
        return first.pop() if first else await asyncio.Event().wait()

    return asyncio.create_task(app({**scope, "query_string": b"", "root_path": ""}, receive, send))


async def a_reply(app) -> int:
    statuses = []

    async def send(message):
        statuses.extend([message["status"]] if "status" in message else [])

    await asyncio.wait_for(asgi(app, ASK, send), 20)
    return statuses[0]


@pytest.mark.parametrize("is_long", [True, False])
def test_a_client_that_stops_reading_is_dropped(is_long, monkeypatch):
    """After so many updates that it left, or so much time; others are served meanwhile."""
    engine = ScriptedEngine()
    app = create_app(make_service(engine, TEMPLATE))
    if is_long:
        text = " a" * 400
        monkeypatch.setattr(turn, "MOST_UNREAD", 50)
        engine.says(text, size=1, hold=threading.Event())
    else:
        monkeypatch.setattr(sse, "WRITE_SECONDS", 0.5)
        engine.says("Hello", hold=threading.Event())

    async def scenario():
        stuck = asyncio.Event()

        async def send(message):
            if message["type"] == "http.response.body":
                stuck.set()
                await asyncio.Event().wait()  # its buffers are full

        reading = asgi(app, {**ASK, "stream": True}, send)
        await asyncio.wait_for(stuck.wait(), 20)
        engine.says("Hello")
        assert await a_reply(app) == 200
        await asyncio.wait_for(reading, 20)
        assert engine.cancelled[0] == {0}

    asyncio.run(scenario())


def test_silence_is_broken(address, engine, monkeypatch):
    """By comments, which clients skip."""
    monkeypatch.setattr(sse, "PING_SECONDS", 0.02)
    engine.says("Hello", hold=(hold := threading.Event()))
    seen = []
    with httpx2.stream("POST", f"{address}/v1/chat/completions", json={**ASK, "stream": True}) as response:
        for line in response.iter_lines():
            seen.append(line)
            if seen.count(": ping") == 3:
                hold.set()
    assert seen.count(": ping") >= 3 and "data: [DONE]" in seen
