"""`generate` and `stream`: prompts in, text out. One path: both consume the same rounds of `decoding.decode`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from mimo_jax import decoding
from mimo_jax.errors import UserError
from mimo_jax.memory import peak_memory
from mimo_jax.model import Model
from mimo_jax.sampling import Greedy, Strategy
from mimo_jax.sharding import check_rows

Prompt = str | Sequence[int]

VISIT_SECONDS = 0.03  # the host looks at a text that is watched about so often
SHARED_ROUNDS = 8  # or after so many rounds, where several processes decode together
_COMPILE_EVENTS = "/jax/core/compile/"  # tracing, lowering, and XLA or its cache


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
    """How drafting went for one row: rounds, the tokens they yielded, and how often each draft slot passed.

    A slot is tested when every slot before it was accepted, so accepted / tested is its conditional acceptance.
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


def generate(
    model: Model,
    prompt: Prompt,
    strategy: Strategy = Greedy(),
    max_tokens: int = 128,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Result:
    """Continues one prompt (text or token ids) by at most `max_tokens` tokens. The same seed gives the same text."""
    return generate_batch(model, [prompt], strategy, max_tokens, seed, stop)[0]


def generate_batch(
    model: Model,
    prompts: Sequence[Prompt],
    strategy: Strategy = Greedy(),
    max_tokens: int = 128,
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
) -> list[Result]:
    """Continues every prompt; no row depends on its batch mates. `seed` is one for all rows, or one per row."""
    *_, (_, results) = _generate(model, list(prompts), strategy, max_tokens, seed, tuple(stop), watch=bool(stop))
    return results


def stream(
    model: Model,
    prompt: Prompt,
    strategy: Strategy = Greedy(),
    max_tokens: int = 128,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[Piece]:
    """Yields the text `generate` would return, in pieces, as it is made. Never yields part of a stop string."""
    shown = ""
    for texts, results in _generate(model, [prompt], strategy, max_tokens, seed, tuple(stop), watch=True):
        text = results[0].text if results else _settled(texts[0], stop)
        yield Piece(text[len(shown) :], results[0] if results else None)
        shown = text


def _settled(text: str, stop: Sequence[str]) -> str:
    """`text` without an end that later tokens may still change: half a character, or the start of a stop string."""
    text = text.rstrip("\ufffd")
    for word in stop:
        for size in range(min(len(word) - 1, len(text)), 0, -1):
            if text.endswith(word[:size]):
                text = text[:-size]
                break
    return text


def _generate(
    model: Model,
    prompts: list[Prompt],
    strategy: Strategy,
    max_tokens: int,
    seed: int | Sequence[int],
    stop: tuple[str, ...],
    watch: bool,
) -> Iterator[tuple[list[str], list[Result]]]:
    """Yields the texts so far after every visit of the host, and at the end the results.

    A text to `watch` is visited every VISIT_SECONDS or so, any other when it is complete.
    """
    begin = time.perf_counter()
    prompt_ids = [encode_prompt(model, prompt) for prompt in prompts]
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    _check_request(prompt_ids, max_tokens, seeds, stop)
    check_rows(len(prompts), model.mesh, "prompts")
    longest = max(len(ids) for ids in prompt_ids)
    limits = np.array([min(max_tokens, model.config.max_position - len(ids)) for ids in prompt_ids], np.int32)
    capacity = decoding.capacity_for(min(longest + max_tokens, model.config.max_position))
    stops = decoding.as_stops(model.stop_ids)
    engine, weights = model.engine, model.weights
    is_alone = jax.process_count() == 1  # else clocks differ, and all processes must run the same rounds
    rounds = max_tokens if not watch else 1 if is_alone else SHARED_ROUNDS  # per visit; a round yields a token at least

    with compile_seconds() as prefill_compile:
        caches = decoding.prefill(engine, weights, prompt_ids, capacity)
        state = decoding.start(engine, *caches, limits, decoding.row_keys(seeds), stops, strategy)
        tokens = decoding.tokens_of(state)
    first_token = time.perf_counter()
    tails = [_Tail(model, stop) for _ in prompts]
    texts = [tail.update(ids) for tail, ids in zip(tails, tokens)]
    yield texts, []

    # A visit of no rounds: compiles and loads the program, which takes half a second even from the cache.
    resumed = time.perf_counter()
    state = jax.block_until_ready(decoding.decode(engine, weights, state, stops, strategy, np.int32(0)))
    ready = time.perf_counter()
    while not all(tail.is_cut or done for tail, done in zip(tails, jax.device_get(state.is_done))):
        visited = time.perf_counter()
        state = decoding.decode(engine, weights, state, stops, strategy, np.int32(rounds))
        tokens = decoding.tokens_of(state)
        if is_alone and time.perf_counter() - visited < VISIT_SECONDS / 2:
            rounds *= 2
        texts = [tail.update(ids) for tail, ids in zip(tails, tokens)]
        yield texts, []
    end = time.perf_counter()

    timing = Timing(
        prompt_tokens=sum(map(len, prompt_ids)),
        generated_tokens=sum(map(len, tokens)),
        prefill_seconds=first_token - begin - prefill_compile[0],
        decode_seconds=end - ready,
        first_token_seconds=first_token - begin,
        compile_seconds=prefill_compile[0] + ready - resumed,
        peak_bytes=peak_bytes(),
    )
    counted = _acceptance(state)
    yield texts, [tail.result(ids, row, timing) for tail, ids, row in zip(tails, tokens, counted)]


def _acceptance(state: decoding.State) -> list[Acceptance]:
    counters, counts_B = jax.device_get((state.counters, state.counts))
    tokens_B = np.maximum(counts_B - 1, 0)  # the first token came with the prefill
    columns = (counters.rounds, tokens_B, counters.tested, counters.accepted)
    return [Acceptance(*row) for row in zip(*(values.tolist() for values in columns))]


class _Tail:
    """Turns one row's growing token list into text, and finds its stop."""

    def __init__(self, model: Model, stop: tuple[str, ...]) -> None:
        self._model, self._stop = model, stop
        self.is_cut = False
        self._text = ""

    def update(self, tokens: list[int]) -> str:
        if not self.is_cut:
            ended = bool(tokens) and tokens[-1] in self._model.stop_ids
            self._text = self._model.tokenizer.decode(tokens[:-1] if ended else tokens)
            cuts = [index for word in self._stop if (index := self._text.find(word)) >= 0]
            if cuts:
                self._text, self.is_cut = self._text[: min(cuts)], True
        return self._text

    def result(self, tokens: list[int], acceptance: Acceptance, timing: Timing) -> Result:
        stopped = self.is_cut or (bool(tokens) and tokens[-1] in self._model.stop_ids)
        return Result(self._text, tokens, "stop" if stopped else "length", acceptance, timing)


def encode_prompt(model: Model, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; empty, over-long, or not encodable prompts are errors that say so."""
    if isinstance(prompt, str):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"prompt: not valid UTF-8 at character {error.start}") from None
        ids = model.tokenizer.encode(prompt)
    else:
        ids = [int(token) for token in prompt]
    config = model.config
    if not ids:
        raise UserError("prompt: empty; at least one token is needed")
    if len(ids) >= config.max_position:
        raise UserError(f"prompt: {len(ids)} tokens; the context holds {config.max_position}, one of them generated")
    bad = [token for token in ids if not 0 <= token < config.vocab_size]
    if bad:
        raise UserError(f"prompt: token id {bad[0]} is outside the vocabulary of {config.vocab_size}")
    return ids


def _check_request(prompts: list[list[int]], max_tokens: int, seeds: list[int], stop: tuple[str, ...]) -> None:
    if not prompts:
        raise UserError("prompt: the batch is empty")
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1")
    if len(seeds) != len(prompts):
        raise UserError(f"seed: {len(seeds)} seeds for {len(prompts)} prompts; give one, or one per prompt")
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"seed: {seeds} must lie in 0..2**32-1")
    if "" in stop:
        raise UserError("stop: an empty stop string would end every text at once")


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
