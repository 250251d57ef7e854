"""The engine as a worker of NVIDIA Dynamo, which has HTTP, templates, texts and routing: ids come in, ids go out."""

from __future__ import annotations

import argparse
import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from dynamo._core import InvalidArgument, WorkerUnavailable
from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig

from mimo_jax.decode.sampling import strategy_of
from mimo_jax.errors import UserError
from mimo_jax.serving.engine import Engine
from mimo_jax.serving.launch import engine_of, model_of
from mimo_jax.serving.requests import Busy, TokenRequest, Update

FINISHES = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "cancelled", "error": "error"}
# What would change an answer and is not had here, with the value that asks for nothing.
NOT_SERVED = {
    "n": 1,  # Dynamo's frontend would end all choices with the first one
    "best_of": 1,
    "guided_decoding": None,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "use_beam_search": False,
    "min_tokens": 0,
    "max_thinking_tokens": None,
    "logprobs": None,
    "prompt_logprobs": None,
}


class DynamoEngine(LLMEngine):
    """Called by Dynamo's event loop; the engine answers on a thread of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._engine: Engine | None = None
        self._tickets = dict[str, int]()

    @classmethod
    async def from_args(cls, argv: argparse.Namespace) -> tuple[DynamoEngine, WorkerConfig]:
        """Of arguments that were read before."""
        directory, name = model_of(argv)
        config = WorkerConfig(
            namespace=argv.namespace,
            component="mimo",
            model_name=str(directory),
            served_model_name=name,
            discovery_backend=argv.discovery_backend,
            tool_call_parser=argv.tool_call_parser,
            reasoning_parser=argv.reasoning_parser,
            enable_kv_routing=False,
        )
        return cls(argv), config

    async def start(self, worker_id: int) -> EngineConfig:
        self._engine = engine = await asyncio.to_thread(engine_of, self._args)
        directory, name = model_of(self._args)
        size = LlmRegistration(context_length=engine.context, max_num_seqs=self._args.slots)
        return EngineConfig(model=str(directory), served_model_name=name, llm=size)

    async def generate(self, request: Mapping[str, Any], context) -> AsyncGenerator[dict[str, Any], None]:
        assert self._engine is not None
        updates, loop = asyncio.Queue[Update](), asyncio.get_running_loop()
        ticket = _submit(self._engine, request, lambda update: loop.call_soon_threadsafe(updates.put_nowait, update))
        self._tickets[context.id()] = ticket
        try:
            finish = None
            while finish is None:
                update = await updates.get()
                finish = update.finish
                yield chunk_of(update)
        finally:
            del self._tickets[context.id()]
            self._engine.cancel(ticket)  # of no effect after the end

    async def abort(self, context) -> None:
        """The client has left."""
        if self._engine is not None and context.id() in self._tickets:
            self._engine.cancel(self._tickets[context.id()])

    async def cleanup(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)


def _submit(engine: Engine, request: Mapping[str, Any], sink) -> int:
    """In Dynamo's words for what is refused; its frontend checks no lengths."""
    try:
        return engine.submit(token_request(request, engine.context), sink)
    except Busy as error:
        raise WorkerUnavailable(str(error)) from None
    except UserError as error:
        raise InvalidArgument(str(error)) from None


def token_request(request: Mapping[str, Any], context: int) -> TokenRequest:
    """What Dynamo's frontend has made of a body."""
    groups = [request.get(group) or {} for group in ("sampling_options", "stop_conditions", "output_options")]
    given = {name: value for group in groups for name, value in group.items() if value is not None}
    for name, nothing in NOT_SERVED.items():
        if given.get(name, nothing) != nothing:
            raise UserError(f"{name}: not served by this worker")
    sampling = {name: given[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in given}
    return TokenRequest(
        prompt=tuple(request["token_ids"]),
        max_tokens=given.get("max_tokens", context),
        strategy=strategy_of(sampling, "sampling") if sampling else None,
        seed=given["seed"] % 2**32 if "seed" in given else secrets.randbits(32),
        stop_ids=() if given.get("ignore_eos") else None,
        presence_penalty=given.get("presence_penalty", 0.0),
        frequency_penalty=given.get("frequency_penalty", 0.0),
    )


def chunk_of(update: Update) -> dict[str, Any]:
    chunk: dict[str, Any] = {"token_ids": list(update.tokens), "index": update.sample}
    if update.finish and update.usage:
        usage = update.usage
        chunk["finish_reason"] = FINISHES[update.finish]
        chunk["completion_usage"] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.generated_tokens,
            "total_tokens": usage.prompt_tokens + usage.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }
    return chunk
