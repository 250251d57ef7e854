"""Errors in the forms of the APIs: one line for the client, details for the log."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mimo_jax.errors import UserError
from mimo_jax.serving.accounts import AccountLimit
from mimo_jax.serving.requests import Busy, TooLong

MOST_LETTERS = 300  # of a message
TOO_LONG = "context_length_exceeded"
LONGEST_WAIT = 120  # seconds: clients that are told to wait longer give up
_BUSY_WAIT = 1.0
ANTHROPIC = "/v1/messages"  # where routes are that have Anthropic's form; OpenAI's is that of all others
_ANTHROPIC_TYPES = {"server_error": "api_error"}  # that have other names there

_log = logging.getLogger(__name__)


class ApiError(Exception):
    """Ends a request with `status`. Message and param may quote what the client sent: both are made one short line."""

    def __init__(
        self,
        status: int,
        type: str,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,  # seconds
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.message, self.code = status, type, _one_line(message), code
        self.param = None if param is None else _one_line(param)
        self.retry_after, self.headers = retry_after, headers or {}

    def body(self, path: str = "") -> dict[str, Any]:
        """As the route at `path` has it."""
        if not path.startswith(ANTHROPIC):
            return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        # There are no codes there: it is by this beginning that agents know when to compact a conversation.
        begin = "prompt is too long: " if self.code == TOO_LONG else ""
        type = _ANTHROPIC_TYPES.get(self.type, self.type)
        return {"type": "error", "error": {"type": type, "message": begin + self.message}}

    def response(self, path: str = "") -> JSONResponse:
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(min(LONGEST_WAIT, max(1.0, self.retry_after))))
        return JSONResponse(self.body(path), self.status, headers)


def _one_line(text: str) -> str:
    """Escapes what does not print, line ends and half characters included."""
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: MOST_LETTERS + 1])
    return line if len(line) <= MOST_LETTERS else line[: MOST_LETTERS - 1] + "…"


# Each takes the message, then what else `ApiError` takes.
bad_request = functools.partial(ApiError, 400, "invalid_request_error")
unauthorized = functools.partial(
    ApiError, 401, "authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
)
method = functools.partial(ApiError, 405, "invalid_request_error")
timeout = functools.partial(ApiError, 408, "invalid_request_error", code="timeout")
too_large = functools.partial(ApiError, 413, "invalid_request_error")
not_json = functools.partial(ApiError, 415, "invalid_request_error")
account_limit = functools.partial(ApiError, 429, "rate_limit_error", code="rate_limit_exceeded")
internal = functools.partial(ApiError, 500, "server_error")
overloaded = functools.partial(ApiError, 503, "overloaded_error")


def not_found(message: str, code: str | None = None) -> ApiError:
    """A model ("model_not_found") or a route."""
    return ApiError(404, "not_found_error", message, code=code)


def fault() -> ApiError:
    return internal("the server failed; its log says why")


def from_exception(error: Exception) -> ApiError:
    """What the client is told; what it is not told is logged."""
    match error:
        case ApiError():
            return error
        case HTTPException(status_code=404):
            return not_found("there is no such route")
        case HTTPException(status_code=405):
            return method("this route does not take this method", headers=error.headers)
        case AccountLimit():
            return account_limit(str(error), retry_after=error.retry_after)
        case Busy():
            return overloaded(str(error), retry_after=_BUSY_WAIT)
        case TooLong():
            return bad_request(str(error), code=TOO_LONG)
        case UserError():
            return bad_request(str(error))
    _log.error("a request failed", exc_info=error)
    return fault()
