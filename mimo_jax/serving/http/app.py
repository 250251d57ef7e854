"""The HTTP app around an engine, for clients of OpenAI's and of Anthropic's APIs."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mimo_jax.errors import UserError
from mimo_jax.serving.accounts import AccountLimit
from mimo_jax.serving.http import metrics, tokenize
from mimo_jax.serving.http.anthropic import Messages, count_tokens
from mimo_jax.serving.http.chat import Chat
from mimo_jax.serving.http.completions import Completions
from mimo_jax.serving.http.disconnect import gone, race
from mimo_jax.serving.http.errors import ANTHROPIC, ApiError, fault, from_exception, overloaded
from mimo_jax.serving.http.limits import Authentication, Keys, LimitOptions, Limits, read_json
from mimo_jax.serving.http.page import page
from mimo_jax.serving.http.responses import Responses
from mimo_jax.serving.http.service import Service
from mimo_jax.serving.http.sse import EventStream
from mimo_jax.serving.http.turn import Run, Turn
from mimo_jax.serving.requests import Busy, TooLong

REJECTIONS: dict[type[Exception], str] = {AccountLimit: "account", Busy: "full", TooLong: "too_long"}


@dataclasses.dataclass(frozen=True)
class AppOptions:
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by account; none: everybody may
    origins: Sequence[str] = ()  # of web pages that may call; others' scripts cannot
    limits: LimitOptions = dataclasses.field(default_factory=LimitOptions)
    idle_seconds: float = 30.0  # an engine that has not come round for so long is not healthy


@runtime_checkable
class Exchange(Protocol):
    """A request of a route that generates: its turns, and two ways to format what comes of them."""

    @property
    def turns(self) -> Sequence[Turn]: ...

    @property
    def is_streamed(self) -> bool: ...

    async def whole(self, run: Run) -> dict[str, Any]: ...

    def messages(self, run: Run) -> AsyncIterator[bytes]: ...


def create_app(service: Service, options: AppOptions = AppOptions()) -> Starlette:
    """Serves what `service` has; whoever made its engine closes it."""
    routes = [
        Route("/", page),
        Route("/v1/chat/completions", partial(_generate, Chat), methods=["POST"]),
        Route("/v1/completions", partial(_generate, Completions), methods=["POST"]),
        Route("/v1/responses", partial(_generate, Responses), methods=["POST"]),
        Route(ANTHROPIC, partial(_generate, Messages), methods=["POST"]),
        Route(f"{ANTHROPIC}/count_tokens", partial(_answer, count_tokens), methods=["POST"]),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/tokenize", partial(_answer, tokenize.tokenize), methods=["POST"]),
        Route("/detokenize", partial(_answer, tokenize.detokenize), methods=["POST"]),
        Route("/health", _health),
        Route("/metrics", _metrics),
    ]
    # In this order: those without a key take no place that others wait for.
    middleware = [Middleware(Authentication, keys=Keys(options.keys)), Middleware(Limits, options=options.limits)]
    if options.origins:  # first, for pages ask without a key whether they may call, and read errors, too
        allowed = {"allow_origins": list(options.origins), "allow_methods": ["*"], "allow_headers": ["*"]}
        middleware.insert(0, Middleware(CORSMiddleware, **allowed))
    errors = {**dict.fromkeys((ApiError, UserError, HTTPException), _error), Exception: _fault}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=errors)
    app.state.service, app.state.options = service, options
    return app


async def _generate(kind: Callable[[Service, dict[str, Any], str], Exchange], request: Request) -> Response:
    service = _service(request)
    service.check_open()
    body = await read_json(request)
    exchange = await run_in_threadpool(kind, service, body, request.state.account)
    run = await Run.start(service, exchange.turns)
    if exchange.is_streamed:
        return EventStream(exchange.messages(run), run)
    try:
        reply = await race(exchange.whole(run), gone(request.receive))
    finally:
        run.cancel()
    return JSONResponse(reply) if reply else Response()  # which nobody reads


async def _answer(work: Callable[[Service, dict[str, Any]], dict[str, Any]], request: Request) -> Response:
    return JSONResponse(await run_in_threadpool(work, _service(request), await read_json(request)))


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_service(request).model_card()]})


async def _model(request: Request) -> Response:
    service = _service(request)
    service.check_name(request.path_params["name"])
    return JSONResponse(service.model_card())


async def _health(request: Request) -> Response:
    """For load balancers: whether to send work here."""
    service, stats = _service(request), _service(request).engine.stats()
    if not stats.is_alive or stats.idle_seconds > request.app.state.options.idle_seconds:
        raise overloaded("the engine does not answer")
    service.check_open()
    return JSONResponse({"status": "ok"})


async def _metrics(request: Request) -> Response:
    service = _service(request)
    return Response(service.metrics.render(service.engine.stats()), media_type=metrics.CONTENT_TYPE)


def _service(request: Request) -> Service:
    return request.app.state.service


async def _error(request: Request, error: Exception) -> Response:
    if reason := REJECTIONS.get(type(error)):
        _service(request).metrics.reject(reason)
    return from_exception(error).response(request.url.path)


async def _fault(request: Request, _: Exception) -> Response:
    """After this Starlette raises it again, and it is the server that logs it."""
    return fault().response(request.url.path)
