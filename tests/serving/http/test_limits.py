"""What the server refuses, over real connections; and JSON beside Python's own."""

import asyncio
import contextlib
import hashlib
import http.client
import json
import socket
import threading
import time

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from mimo_jax.errors import UserError
from mimo_jax.serving.accounts import AccountLimit
from mimo_jax.serving.http.errors import ApiError, bad_request, from_exception
from mimo_jax.serving.http.limits import Authentication, Keys, LimitOptions, Limits, parse_json, read_json
from mimo_jax.serving.requests import Busy, TooLong

OPTIONS = LimitOptions(header_bytes=4000, path_bytes=500, body_bytes=10_000, body_seconds=0.3, concurrency=2)
JSON = {"Content-Type": "application/json"}


class Service:
    """Echoes JSON; streams numbers until `release`, or notices that the client has left."""

    def __init__(self) -> None:
        self.release, self.left = threading.Event(), threading.Event()
        routes = [
            Route("/echo", self.echo, methods=["POST"]),
            Route("/stream", self.stream, methods=["POST"]),
            *(Route(path, self.account) for path in ("/health", "/", "/metrics")),
        ]
        handlers = {kind: self.refuse for kind in (ApiError, HTTPException)}
        self.app = Starlette(routes=routes, exception_handlers=handlers)

    async def refuse(self, request, error):
        return from_exception(error).response()

    async def echo(self, request):
        return JSONResponse(await read_json(request))

    async def account(self, request):
        return JSONResponse({"account": request.state.account if hasattr(request.state, "account") else None})

    async def stream(self, request):
        await request.json()

        async def numbers():
            try:
                yield b"0 "
                while not self.release.is_set():
                    await asyncio.sleep(0.01)
                yield b"1 "
            except asyncio.CancelledError:
                self.left.set()
                raise

        return StreamingResponse(numbers())


@contextlib.contextmanager
def serving(app):
    """The port of a server on this machine alone."""
    options = {"ws": "none", "lifespan": "off", "http": "h11", "log_level": "error", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port():
    with serving(Limits(Service().app, OPTIONS)) as port:
        yield port


def ask(port, method="POST", path="/echo", body=b"{}", headers=JSON):
    """Status, headers and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.headers, json.loads(answer.read())


def speak(port, text: bytes) -> bytes:
    """Everything the server says to these bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(text)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def listen(connection, last: bytes) -> None:
    said = b""
    while last not in said:
        heard = connection.recv(65536)
        assert heard, said
        said += heard


def head(*lines: str, path="/echo") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines, "", ""]).encode()


REFUSED = {
    "headers": (413, {"headers": JSON | {f"X-{number}": "1" for number in range(100)}}),
    "bytes of headers": (413, {"headers": JSON | {"X-Long": "x" * 4000}}),
    "path": (413, {"path": "/" + "x" * 500}),
    "query": (413, {"path": "/echo?" + "x" * 500}),
    "body": (413, {"body": b'"' + b"x" * 10_000}),
    "body of unknown length": (413, {"body": iter([b'"' + b"x" * 6000] * 2)}),
    "body of megabytes": (413, {"body": b" " * (64 << 20)}),
    "form": (415, {"headers": {"Content-Type": "application/x-www-form-urlencoded"}}),
    "no type": (415, {"headers": {}}),
    "not JSON": (400, {"body": b"{"}),
    "no object": (400, {"body": b"[]"}),
    "route": (404, {"path": "/nothing"}),
    "method": (405, {"method": "GET"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(port, name):
    """With the status that the table of the API says, and its form of errors; also while the body is still sent."""
    status, request = REFUSED[name]
    found, headers, body = ask(port, **request)
    assert found == status
    assert headers["Content-Type"] == "application/json"
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert 0 < len(body["error"]["message"]) <= 300


def test_what_is_just_allowed(port):
    """At the limits, in one piece or many, and with a charset behind the type."""
    body = json.dumps({"text": "ü" * 1000}, ensure_ascii=False).encode()
    body += b" " * (OPTIONS.body_bytes - len(body))
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    for sent in (body, iter([body[:1000], body[1000:1001], body[1001:]])):
        assert ask(port, body=sent, headers=headers)[::2] == (200, {"text": "ü" * 1000})


def test_a_declared_length_is_believed(port):
    """A gigabyte is refused before it is sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head(f"Content-Length: {10**9}"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_slow_body_is_not_waited_for(port):
    """408, and the connection is closed, whether nothing more comes or a letter now and then."""
    said = speak(port, head("Content-Length: 100") + b"{")
    assert said.startswith(b"HTTP/1.1 408") and b'"code":"timeout"' in said
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head("Content-Length: 1000"))
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(b" ")
                time.sleep(0.01)


def test_streams_pass_and_count():
    """Pieces arrive as they are made; two streams fill a server of two, whose health is still told."""
    service = Service()
    with serving(Limits(service.app, OPTIONS)) as port:
        streams = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(2)]
        for stream in streams:
            stream.sendall(head("Content-Length: 2", path="/stream") + b"{}")
            listen(stream, b"0 ")
        status, headers, body = ask(port)
        assert (status, body["error"]["type"]) == (503, "overloaded_error")
        assert 1 <= int(headers["Retry-After"]) <= 120
        assert ask(port, "GET", "/health")[0] == 200
        streams[0].close()
        assert service.left.wait(20)  # the client's leaving came through
        while ask(port)[0] == 503:
            time.sleep(0.01)
        assert ask(port)[0] == 200
        service.release.set()
        with streams[1] as stream:
            listen(stream, b"1 ")


def test_only_those_with_a_key_pass():
    """By any of the three headers; health and the page are open, nothing that looks like them is."""
    service = Service()
    keys = Keys({"ann": "key-a", "bob": "key-b"})
    with serving(Authentication(Limits(service.app, OPTIONS), keys)) as port:
        get = lambda path, **headers: ask(port, "GET", path, None, headers)  # noqa: E731
        for headers in ({"Authorization": "Bearer key-b"}, {"api-key": "key-b"}, {"x-api-key": "key-b"}):
            assert get("/metrics", **headers)[::2] == (200, {"account": "bob"})
        assert get("/metrics", Authorization="bearer key-a")[2] == {"account": "ann"}
        assert get("/health")[0] == get("/")[0] == 200
        for path in ("/metrics", "/health/", "//health", "/x/../health", "/nothing"):
            status, headers, body = get(path)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key"), path
            assert headers["WWW-Authenticate"] == "Bearer"
        for wrong in ("", "Bearer", "Bearer ", "Bearer key", "Bearer key-a x", "Basic key-a", "key-a"):
            assert get("/metrics", Authorization=wrong)[0] == 401, wrong
        assert ask(port, "POST", "/", headers=JSON)[0] == 401


def test_without_keys_everybody_is_nobody():
    assert Keys({}).account_of({"authorization": "Bearer anything"}) == ""


BAD_KEYS = [{"": "secret"}, {"a": ""}, {"a": "the secret"}, {"a": "secret\xfc"}, dict.fromkeys("ab", "secret")]


@pytest.mark.parametrize("keys", BAD_KEYS)
def test_keys_that_would_open_the_door_are_refused(keys):
    """And the line that says so tells none of them."""
    with pytest.raises(UserError) as caught:
        Keys(keys)
    assert "secret" not in str(caught.value)


NUMBERS = st.integers(-(10**19) + 1, 10**19 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(VALUES, st.booleans())
def test_json_is_read_as_python_reads_it(value, is_ascii):
    """Whatever is valid, escaped or not."""
    text = json.dumps(value, ensure_ascii=is_ascii)
    assert parse_json(text.encode()) == value


@given(st.text(st.sampled_from('[]{}",:\\ a1u-.e'), max_size=30))
def test_other_text_is_refused_as_python_refuses_it(text):
    """Brackets and quotes in any order: what has no error is read, what has one is a 400."""
    try:
        expected = json.loads(text)
    except json.JSONDecodeError:
        with pytest.raises(ApiError) as caught:
            parse_json(text.encode())
        assert caught.value.status == 400
    else:
        assert parse_json(text.encode()) == expected


WRONG = {
    "nothing": b"",
    "nested": b"[" * 101 + b"]" * 101,
    "objects nested": b'{"echo":' * 101 + b"1" + b"}" * 101,
    "nested after strings": rb'{"\"[\\": ' + b"[" * 100 + b"]" * 100 + b"}",
    "nested after errors": b"]" * 200 + b"[" * 200_000,
    "NaN": b'{"echo": NaN}',
    "infinity": b"[-Infinity]",
    "a long number": b"1" * 20,
    "a number of megabytes": b"-" + b"1" * (4 << 20),
    "a large float": b"1e999",
    "not UTF-8": b'"echo\xff"',
    "UTF-16": '"echo"'.encode("utf-16"),
    "half a pair": rb'["echo\ud800"]',
    "half a pair as a key": rb'{"\uDC00echo": 1}',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "control characters": b'"echo\n"',
    "two values": b"{} echo",
}


@pytest.mark.parametrize("name", WRONG)
def test_json_with_a_catch(name):
    """A line of at most 300 letters, and nothing of what was sent."""
    with pytest.raises(ApiError) as caught:
        parse_json(WRONG[name])
    assert caught.value.status == 400
    assert len(caught.value.message) <= 300 and "echo" not in caught.value.message


def test_json_that_only_looks_odd():
    """Depth 100, brackets in strings, 19 digits, a whole pair, the same key twice, an escape that is none."""
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    assert parse_json(b"[" * 100 + b"1" + b"]" * 100) == deep
    assert parse_json(b'["' + b"[" * 1000 + rb'\"{\\"]') == ["[" * 1000 + '"{\\']
    assert parse_json(b"[-9999999999999999999, 1e-999]") == [-9999999999999999999, 0.0]
    assert parse_json(rb'["\ud83d\ude00"]') == ["😀"]
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}
    assert parse_json(rb'["\\ud800"]') == ["\\ud800"]


@pytest.mark.parametrize("text", [b'"\\"', b'"\\', b"\\", b'"', b"[", b"[]", b'"",', b'\\"', b"{[", b'"\\"\\'])
def test_two_megabytes_of_anything_are_read_once(text):
    """Were the time quadratic, this would take an hour."""
    with pytest.raises(ApiError):
        parse_json(text * ((2 << 20) // len(text)))
    with pytest.raises(ApiError):
        parse_json(b'"' + text * ((2 << 20) // len(text)))


ERRORS = [
    (bad_request("no", "messages", "code"), 400, "invalid_request_error", "code"),
    (TooLong("too long"), 400, "invalid_request_error", "context_length_exceeded"),
    (UserError("wrong"), 400, "invalid_request_error", None),
    (AccountLimit("wait", 5000), 429, "rate_limit_error", "rate_limit_exceeded"),
    (Busy("full"), 503, "overloaded_error", None),
    (KeyError("secret"), 500, "server_error", None),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), ERRORS)
def test_errors_that_clients_know(error, status, kind, code):
    """Waits are whole seconds that a client is ready to wait; what is not meant for it is not told."""
    response = from_exception(error).response()
    found = json.loads(response.body)["error"]
    assert (response.status_code, found["type"], found["code"]) == (status, kind, code)
    assert "secret" not in found["message"]
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert 1 <= int(response.headers.get("retry-after", 1)) <= 120


@given(st.text())
def test_a_message_is_one_printable_line(text):
    """Whatever it quotes: line ends, terminal codes, halves of pairs, a megabyte."""
    for message in (text, text * 100):
        error = bad_request(message, message)
        body = json.loads(error.response().body)["error"]
        for shown in (body["message"], body["param"]):
            assert len(shown) <= 300 and all(letter.isprintable() for letter in shown)


def test_the_log_says_what_the_client_is_not_told(caplog):
    from_exception(KeyError("secret"))
    assert "secret" in caplog.text


def test_keys_are_compared_whole():
    """A key that begins or ends like another, or equals its digest, opens nothing."""
    keys = Keys({"a": "abcdef"})
    for wrong in ("abcde", "abcdefg", "", hashlib.sha256(b"abcdef").hexdigest()):
        with pytest.raises(ApiError) as caught:
            keys.account_of({"x-api-key": wrong})
        assert caught.value.status == 401
