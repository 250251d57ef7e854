"""What is refused before a route sees it: too much, too slow, too many at once, bad JSON, a wrong key."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimo_jax.errors import UserError
from mimo_jax.serving.http.errors import ApiError, bad_request, not_json, overloaded, timeout, too_large, unauthorized

MOST_NESTING = 100
MOST_DIGITS = 19  # of a whole number: those of 64 bits


@dataclasses.dataclass(frozen=True)
class LimitOptions:
    headers: int = 100
    header_bytes: int = 32 << 10
    path_bytes: int = 8 << 10  # with the query
    body_bytes: int = 8 << 20
    body_seconds: float = 10.0  # until the body is here
    concurrency: int = 256  # requests under way, streams included


class Limits:
    """Hands on requests that keep to the options, each with its whole body; answers others itself."""

    def __init__(self, app: ASGIApp, options: LimitOptions) -> None:
        self._app, self._options, self._running = app, options, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        self._running += 1
        try:
            self._check(scope)
            body = await self._body(receive)
        except ApiError as error:
            return await error.response(scope["path"])(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _with_body(body, receive), send)
        finally:
            self._running -= 1

    def _check(self, scope: Scope) -> None:
        options, headers = self._options, scope["headers"]
        if self._running > options.concurrency and scope["path"] != "/health":  # a full server is a healthy one
            raise overloaded("the server is full", retry_after=1.0)
        values = dict(headers)
        length = values.get(b"content-length", b"")[:MOST_DIGITS]
        self._limit(
            headers=len(headers),
            header_bytes=sum(len(name) + len(value) for name, value in headers),
            path_bytes=len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"]),
            body_bytes=int(length) if length.isdigit() else 0,
        )
        kind = values.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            raise not_json("the header Content-Type must be application/json")

    def _limit(self, **found: int) -> None:
        """By the names of the options."""
        for name, count in found.items():
            if count > (most := getattr(self._options, name)):
                raise too_large(f"the request has more than {most} {name.replace('_', ' ')}")

    async def _body(self, receive: Receive) -> bytes | None:
        """None if the client has left."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._options.body_seconds):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    self._limit(body_bytes=len(body))
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            seconds = f"{self._options.body_seconds:g}"
            raise timeout(f"the body took more than {seconds} seconds", headers={"Connection": "close"}) from None
        return None


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Gives the body first, then what else happens: that the client leaves."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message


async def read_json(request: Request) -> dict[str, Any]:
    """The body, which must be an object."""
    value = parse_json(await request.body())
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object")
    return value


def parse_json(body: bytes) -> Any:
    """JSON of RFC 8259 in UTF-8, with limits on nesting and numbers; raises `ApiError` without a word of the body."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8 at byte {error.start}") from None
    if _nesting(body) > MOST_NESTING:
        raise bad_request(f"the body is nested more than {MOST_NESTING} deep")
    try:
        value = json.loads(text, parse_int=_whole, parse_float=_real, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON at character {error.pos}: {error.msg}") from None
    if _HALF.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad_request("the body has half of a surrogate pair") from None
    return value


# Possessive, and with ends that may be missing: so it never goes back, however broken the text.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # perhaps: most are one of a pair


def _nesting(body: bytes) -> int:
    """Of brackets outside of strings. Up to the first error, which ends parsing, it is the parser's own depth."""
    outside = np.frombuffer(_STRING.sub(b"", body), np.uint8)
    return int(np.cumsum(_STEPS[outside], dtype=np.int32).max(initial=0))


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise bad_request(f"the body has a whole number of more than {MOST_DIGITS} digits")
    return int(digits)


def _real(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise bad_request("the body has a number beyond the range of 64-bit floats")
    return value


def _constant(name: str) -> NoReturn:
    raise bad_request(f"the body has {name}, which JSON does not know")


class Keys:
    """One key per account; without any, everybody is account ""."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        for account, key in keys.items():
            if not account or not re.fullmatch(r"[!-~]+", key):
                raise UserError(f"key of account {account!r}: an account has a name, and a key of printable ASCII")
        if len(set(keys.values())) < len(keys):
            raise UserError("keys: two accounts have the same one")
        self._digests = {account: _digest(key) for account, key in keys.items()}

    def account_of(self, headers: Mapping[str, str]) -> str:
        """Of "authorization: Bearer KEY", "api-key: KEY" or "x-api-key: KEY", the first that is there."""
        if not self._digests:
            return ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = (bearer if scheme.lower() == "bearer" else "") or headers.get("api-key") or headers.get("x-api-key") or ""
        offered = _digest(key.strip())
        # All are compared: how long it takes says nothing.
        found = [account for account, digest in self._digests.items() if hmac.compare_digest(digest, offered)]
        if not found:
            raise unauthorized("the key is wrong" if key else "the header Authorization: Bearer KEY is missing")
        return found[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Authentication:
    """Puts the account into `request.state.account`; 401 for those who have none, but for /health and the page at /."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                is_open = scope["path"] == "/health" or (scope["method"], scope["path"]) == ("GET", "/")
                account = "" if is_open else self._keys.account_of(Headers(scope=scope))
            except ApiError as error:
                return await error.response(scope["path"])(scope, receive, send)
            scope.setdefault("state", {})["account"] = account
        await self._app(scope, receive, send)
