"""`generate` and `stream`: requests in, text out. One path: both consume the same rounds of `decode.loop`."""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from mimo_jax.cli.memory import peak_memory
from mimo_jax.config.model import ModelConfig
from mimo_jax.decode import loop
from mimo_jax.decode.controls import Controls, stops_of
from mimo_jax.decode.sampling import Strategy, rows_of
from mimo_jax.errors import UserError
from mimo_jax.loading import Model
from mimo_jax.media.parts import Part
from mimo_jax.media.prompt import Encoded, Shown, assemble, batched
from mimo_jax.media.towers import show
from mimo_jax.sharding import check_rows
from mimo_jax.text import Transcript

# Text, token ids, or pieces one after another: text, token ids, and parts that are images, audio or video.
Prompt = str | Sequence[int] | np.ndarray | Sequence[str | Part | Sequence[int]] | Encoded

VISIT_SECONDS = 0.05  # the host looks at a text that is watched about so often
SHARED_ROUNDS = 8  # or after so many rounds, where several processes decode together
_COMPILE_EVENTS = "/jax/core/compile/"  # tracing, lowering, and XLA or its cache


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for: a prompt to continue by at most `max_tokens` tokens, or up to the first of the `stop` strings.

    The same `seed` gives the same text. Without a `strategy` the checkpoint's own decides (`Model.strategy`).
    """

    prompt: Prompt
    strategy: Strategy | None = None
    max_tokens: int = 128
    seed: int = 0
    stop: Sequence[str] = ()
    literal: bool = False  # the names of special tokens in the prompt are text like any other

    def __post_init__(self) -> None:
        for field in ("max_tokens", "seed"):
            object.__setattr__(self, field, _whole(getattr(self, field), field))
        if isinstance(self.stop, str):
            raise UserError(f"stop={self.stop!r} must be a list of strings")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must lie in 0..2**32-1")
        if "" in self.stop:
            raise UserError("stop: an empty stop string would end every text at once")


def _whole(value: Any, name: str) -> int:
    """A whole number of any kind, NumPy's too, as Python's."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name}={value!r} must be a whole number") from None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds and bytes of one call; compilation is not part of the speeds."""

    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    first_token_seconds: float  # from the call to the first token, compilation included
    compile_seconds: float
    peak_bytes: int

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / max(self.decode_seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """How drafting went for one row: rounds, the tokens they yielded, and how often each draft position passed.

    A position is tested when every one before it was accepted, so accepted / tested is its conditional acceptance.
    """

    rounds: int
    tokens: int
    tested: list[int]
    accepted: list[int]

    @property
    def tokens_per_round(self) -> float:
        """Accepted drafts and the target's own token, per verification pass. At most the block size."""
        return self.tokens / max(self.rounds, 1)


@dataclasses.dataclass(frozen=True)
class Result:
    """One row's text. `finish_reason` is "stop" (a stop token or string) or "length"; `timing` is the batch's."""

    text: str
    tokens: list[int]
    finish_reason: str
    acceptance: Acceptance
    timing: Timing


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of streamed text; the last piece carries the `result`."""

    text: str
    result: Result | None = None


def as_request(prompt: Prompt | Request, strategy: Strategy | None = None, **fields: Any) -> Request:
    """A prompt with the other fields of a `Request`; or a request, with those that are given in place of its own."""
    if strategy is not None:
        fields["strategy"] = strategy
    return dataclasses.replace(prompt, **fields) if isinstance(prompt, Request) else Request(prompt, **fields)


def generate(model: Model, prompt: Prompt | Request, strategy: Strategy | None = None, **fields: Any) -> Result:
    """Continues one prompt. `fields` are those of `Request`: max_tokens, seed, stop."""
    return generate_batch(model, [prompt], strategy, **fields)[0]


def generate_batch(
    model: Model, prompts: Sequence[Prompt | Request], strategy: Strategy | None = None, **fields: Any
) -> list[Result]:
    """Continues every prompt, or serves every request; no row depends on its batch mates."""
    requests = [as_request(prompt, strategy, **fields) for prompt in prompts]
    *_, (_, results) = _serve(model, requests, is_watched=any(request.stop for request in requests))
    return results


def stream(model: Model, prompt: Prompt | Request, strategy: Strategy | None = None, **fields: Any) -> Iterator[Piece]:
    """Yields the text `generate` would return, in pieces, as it is made. Never yields part of a stop string."""
    shown = ""
    for (transcript,), results in _serve(model, [as_request(prompt, strategy, **fields)], is_watched=True):
        text = transcript.text if results else transcript.settled
        yield Piece(text[len(shown) :], results[0] if results else None)
        shown = text


def _serve(model: Model, requests: list[Request], is_watched: bool) -> Iterator[tuple[list[Transcript], list[Result]]]:
    """Yields the texts so far after every visit of the host, and at the end the results.

    A text that is watched is visited every VISIT_SECONDS or so, any other when it is complete.
    """
    begin = time.perf_counter()
    if not requests:
        raise UserError("prompt: the batch is empty")
    prompts = [encode_prompt(model, request.prompt, request.literal) for request in requests]
    strategies = [model.strategy if request.strategy is None else request.strategy for request in requests]
    check_rows(len(prompts), model.mesh, "prompts")
    ids_of_rows, media_RD = batched(prompts)
    room = [model.config.max_position - len(ids) for ids in ids_of_rows]
    limits = np.array([min(request.max_tokens, left) for request, left in zip(requests, room)], np.int32)
    capacity = loop.capacity_for(max(len(ids) + int(limit) for ids, limit in zip(ids_of_rows, limits)))
    controls = Controls(rows_of(strategies), stops_of([model.stop_ids] * len(prompts)))
    decoder, weights = model.decoder, model.weights
    keys = loop.row_keys([request.seed for request in requests])
    is_alone = jax.process_count() == 1  # else clocks differ, and all processes must run the same rounds
    # Per visit; a round yields a token at least.
    rounds = int(limits.max()) if not is_watched else 1 if is_alone else SHARED_ROUNDS

    with compile_seconds() as prefill_compile:
        caches = loop.prefill(decoder, loop.with_media(weights, media_RD), ids_of_rows, capacity)
        state = loop.start(decoder, *caches, limits, keys, controls)
        tokens, is_done = loop.progress(state)
    first_token = time.perf_counter()
    transcripts = [Transcript(model.tokenizer, model.stop_ids, request.stop) for request in requests]
    _update(transcripts, tokens)
    yield transcripts, []

    # A visit of no rounds: compiles and loads the program, which takes half a second even from the cache.
    resumed = time.perf_counter()
    state = jax.block_until_ready(loop.decode(decoder, weights, state, controls, 0))
    ready = time.perf_counter()
    while not all(row.is_cut or done for row, done in zip(transcripts, is_done)):
        visited = time.perf_counter()
        state = loop.decode(decoder, weights, state, controls, rounds)
        tokens, is_done = loop.progress(state)
        if is_watched and is_alone:
            rounds = max(1, int(rounds * VISIT_SECONDS / (time.perf_counter() - visited)))
        _update(transcripts, tokens)
        yield transcripts, []
    end = time.perf_counter()

    used = [transcript.used for transcript in transcripts]
    timing = Timing(
        prompt_tokens=sum(map(len, ids_of_rows)),
        generated_tokens=sum(used),
        prefill_seconds=first_token - begin - prefill_compile[0],
        decode_seconds=end - ready,
        first_token_seconds=first_token - begin,
        compile_seconds=prefill_compile[0] + ready - resumed,
        peak_bytes=peak_bytes(),
    )
    counted = _acceptance(state, used)
    results = [
        Result(row.text, row.tokens, "stop" if row.is_stopped else "length", acceptance, timing)
        for row, acceptance in zip(transcripts, counted)
    ]
    yield transcripts, results


def _update(transcripts: list[Transcript], tokens: list[list[int]]) -> None:
    for transcript, ids in zip(transcripts, tokens):
        transcript.update(ids)


def _acceptance(state: loop.State, used: list[int]) -> list[Acceptance]:
    """Of each row's first `used` tokens; what a visit decoded after a stop string does not count."""
    counters, counts, rounds_BS = jax.device_get((state.counters, state.counts, state.rounds))
    rows = []
    for row, (count, own) in enumerate(zip(counts.tolist(), used)):
        tested, accepted = counters.tested[row], counters.accepted[row]
        if own < count:
            tested, accepted = _until(rounds_BS[row, :count], own, len(tested))
        last = int(rounds_BS[row, own - 1]) if own else 0
        # The first token came with the prefill.
        rows.append(Acceptance(last, max(own - 1, 0), tested.tolist(), accepted.tolist()))
    return rows


def _until(round_S: np.ndarray, own: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each draft position was tested and accepted up to token `own`, from the round each token came from."""
    made, taken = np.bincount(round_S), np.bincount(round_S[:own], minlength=1)
    kept = taken[1:]
    # A whole round ends with the target's own token; of one that is cut, every token kept is an accepted draft.
    accepted = np.where(kept == made[1 : len(taken)], kept - 1, kept)
    position = np.arange(positions)
    return (position < kept[:, None]).sum(axis=0), (position < accepted[:, None]).sum(axis=0)


def encode_prompt(model: Model, prompt: Prompt, literal: bool = False) -> Encoded:
    """A prompt's token ids, and what its media show; towers have not run yet.

    Empty, over-long, or not encodable prompts are errors that say so.
    """
    if isinstance(prompt, Encoded):
        return prompt
    config = model.config
    is_pieces = isinstance(prompt, list | tuple) and any(isinstance(piece, str | Part) for piece in prompt)
    shown = encode_pieces(model, prompt if is_pieces else [prompt], literal)
    if not shown.ids:
        raise UserError("prompt: empty; at least one token is needed")
    if len(shown.ids) >= config.max_position:
        raise UserError(
            f"prompt: {len(shown.ids)} tokens; the context holds {config.max_position}, one of them generated"
        )
    return shown


def encode_pieces(model: Model, pieces: Sequence[Any], literal: bool = False) -> Encoded:
    """Texts, token ids and parts, one after another; of whatever length."""
    return assemble([_piece(model, piece, literal) for piece in pieces], model.config.vocab_size)


def _piece(model: Model, piece: Any, literal: bool) -> list[int] | Shown:
    if isinstance(piece, Part):
        return show(model.towers, piece, lambda text: model.tokenizer.encode(text, literal=True))
    if isinstance(piece, str):
        try:
            piece.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"prompt: not valid UTF-8 at character {error.start}") from None
        ids = model.tokenizer.encode(piece, literal)
    else:
        ids = [_whole(token, "prompt: token id") for token in piece]
    check_ids(model.config, ids)
    return ids


def check_ids(config: ModelConfig, ids: Sequence[int]) -> None:
    """That all are tokens of the vocabulary, and none is one that stands for a row of media."""
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise UserError(f"prompt: token id {token} is outside the vocabulary of {config.vocab_size}")
        if config.media and token in config.media.rows:
            raise UserError(f"prompt: token id {token} stands for media; give an Image, Audio or Video in its place")


@contextmanager
def compile_seconds() -> Iterator[list[float]]:
    """A one-element list that grows by the seconds spent on compilation within the block."""
    total = [0.0]

    def listen(event: str, duration_secs: float, **_) -> None:
        if event.startswith(_COMPILE_EVENTS):
            total[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield total
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def peak_bytes() -> int:
    """The most memory held so far: the device's where it tells, else this process's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or peak_memory()
