"""What the engine takes and gives: token ids and rows of media, never text, and nothing of HTTP."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from mimo_jax.decode.sampling import Strategy
from mimo_jax.errors import UserError, check_real, check_whole
from mimo_jax.generation import Acceptance
from mimo_jax.media.prompt import Media

MOST_SAMPLES = 64
MOST_TOP_LOGPROBS = 20
MOST_SEED = 2**32 - 1

# "deadline": its time was up; "cancelled": its caller wanted no more; "error": the engine failed.
Finish = Literal["stop", "length", "deadline", "cancelled", "error"]


class Busy(UserError):
    """The server is full, or closing: the same request may succeed later."""


class TooLong(UserError):
    """A prompt that the context, or a row of this engine, cannot hold."""


@runtime_checkable
class Matcher(Protocol):
    """What a grammar still allows of one text. The engine's thread calls it, between two rounds."""

    def masks(self, drafts: Sequence[int], out: np.ndarray) -> None:
        """Row i of `out`, uint32[len(drafts) + 1, ceil(C / 32)], gets the tokens allowed after `drafts[:i]`.

        Token t is bit t % 32 of word t // 32. Rows after a draft that is not allowed may hold anything but no token.
        """
        ...

    def commit(self, tokens: Sequence[int]) -> None:
        """The text goes on with `tokens`, each of which was allowed."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenRequest:
    """A prompt to continue, `samples` times.

    Sample i is drawn with `seed` + i, and equals what `generate` makes of it. Penalties are those of the OpenAI API:
    they count tokens that were generated, not those of the prompt.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 128
    strategy: Strategy | None = None  # None: the model's own
    seed: int = 0
    samples: int = 1
    stop_ids: tuple[int, ...] | None = None  # None: the model's; (): none
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    top_logprobs: int | None = None  # None: no logarithms; 0: of the token itself only
    matcher: Callable[[], Matcher] | None = None  # makes one for each sample
    seconds: float = math.inf  # from submission to the end; what there is by then is the answer
    account: str = ""  # whose share of the engine, and of the prefix cache, it takes
    media: Media | None = None  # what ids of the prompt beyond the vocabulary stand for

    @property
    def known(self) -> tuple[int, ...]:
        """The prompt as caches know it."""
        return self.prompt if self.media is None else self.media.known(self.prompt)

    def __post_init__(self) -> None:
        check_whole("request", 1, max_tokens=self.max_tokens)
        check_whole("request", 0, MOST_SEED, seed=self.seed)
        check_whole("request", 1, MOST_SAMPLES, n=self.samples)
        check_real("request", -2, 2, presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty)
        for token, bias in self.logit_bias.items():
            check_real("logit_bias", -100, 100, **{str(token): bias})
        if self.top_logprobs is not None:
            check_whole("request", 0, MOST_TOP_LOGPROBS, top_logprobs=self.top_logprobs)
        if not self.seconds > 0:
            raise UserError(f"request: seconds={self.seconds} must be above 0")


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Natural logarithms of a token's probability, and of the most likely ones, before temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), the most likely first


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one sample has taken. Its seconds follow one another: it waits, its prompt is read, it decodes."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, that were not read anew
    generated_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    acceptance: Acceptance


@dataclasses.dataclass(frozen=True)
class Update:
    """The newest tokens of a sample; the last update says why it ended."""

    sample: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()  # one per token, where they were asked for
    finish: Finish | None = None
    usage: Usage | None = None  # up to now; always there beside `finish`


Sink = Callable[[Update], None]  # called by the engine's thread, so it returns at once


@dataclasses.dataclass(frozen=True)
class Stats:
    """Gauges of the moment, and counters since the start."""

    slots: int
    running: int
    waiting: int
    waiting_tokens: int
    cache_bytes: int
    cache_limit: int
    idle_seconds: float  # since the engine's thread last came round; it does many times per second
    is_alive: bool
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    rounds: int
    drafted_tokens: int
    accepted_tokens: tuple[int, ...]  # per draft position
    finished: Mapping[str, int]  # by `Finish`


@runtime_checkable
class Serving(Protocol):
    """An engine, for those who serve it."""

    def submit(self, request: TokenRequest, sink: Sink) -> int:
        """Queues it and returns its ticket; raises `TooLong`, `Busy` or another `UserError` instead of an update."""
        ...

    def cancel(self, ticket: int, sample: int | None = None) -> None:
        """Ends a request, or one of its samples, with "cancelled"; one that has ended stays as it is."""
        ...

    def stats(self) -> Stats: ...

    def close(self, grace: float = 0.0) -> None:
        """Takes no more, lets what runs go on for `grace` seconds, then ends it."""
        ...
