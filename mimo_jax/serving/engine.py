"""The engine: requests of token ids in, updates out. One thread owns the device; any thread may submit.

A round of the thread: what is no longer wanted leaves, waiting prompts are read, a chunk of one or, while slots are
free, some short ones, all texts decode for some milliseconds, and what is new goes to the sinks. So whoever arrives,
leaves or is late waits for some tens of milliseconds and a chunk, and a text is never changed by others: it is
`generate`'s, token for token.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from mimo_jax.config.model import MAX_BLOCK
from mimo_jax.decode.sampling import Greedy
from mimo_jax.errors import UserError, check_whole
from mimo_jax.generation import Acceptance
from mimo_jax.loading import Model
from mimo_jax.serving.accounts import AccountRules, Accounts, FairOrder
from mimo_jax.serving.prefix_cache import PrefixCache
from mimo_jax.serving.reader import Reader
from mimo_jax.serving.requests import Busy, Finish, Sink, Stats, TokenRequest, TooLong, Update, Usage
from mimo_jax.serving.slots import News, Slots, Text
from mimo_jax.sharding import check_rows

VISIT_SECONDS = 0.025  # of decoding, between two looks at what has arrived
MOST_ROUNDS = 256  # of a visit, however short they are
LEAST_SECONDS = 1e-6  # that anything takes, whatever the clock says
IDLE_SECONDS = 0.5  # the thread shows that it lives so often
MOST_CONTEXT = 4096  # of a row, where nothing else is said
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine holds, and when it refuses more."""

    slots: int = 4  # texts that decode together
    context: int = MOST_CONTEXT  # tokens of a prompt and its continuation; less if the model's context is shorter
    cache_bytes: int = 256_000_000  # of prefixes kept
    waiting: int = 256  # requests
    waiting_tokens: int = 1_000_000  # of their prompts

    def __post_init__(self) -> None:
        check_whole("engine", 1, **{name: getattr(self, name) for name in ("slots", "context")})
        check_whole("engine", 0, 10**12, cache_bytes=self.cache_bytes)
        check_whole("engine", 1, waiting=self.waiting, waiting_tokens=self.waiting_tokens)


@dataclasses.dataclass(eq=False)
class _Job:
    """A request on its way."""

    ticket: int
    request: TokenRequest
    sink: Sink
    submitted: float
    unwanted: set[int] = dataclasses.field(default_factory=set)  # samples
    ended: dict[int, Usage] = dataclasses.field(default_factory=dict)
    cached: int = 0
    reading: float = math.nan  # when its prompt began to be read
    read: float = math.nan  # and when that had ended

    @property
    def samples(self) -> range:
        return range(self.request.samples)

    def is_late(self, now: float) -> bool:
        return now - self.submitted >= self.request.seconds


@dataclasses.dataclass(frozen=True)
class _Reading:
    """The request whose prompt is being read, or has been, while samples of it wait for slots."""

    job: _Job
    reader: Reader
    samples: deque[int]

    @classmethod
    def of(cls, job: _Job, reader: Reader) -> _Reading:
        return cls(job, reader, deque(job.samples))


class Engine:
    """Serves a model. `close` it, or use it as a context manager."""

    def __init__(
        self,
        model: Model,
        limits: Limits | None = None,
        rules: AccountRules | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = limits or Limits()
        self.accounts = Accounts(rules or AccountRules(), clock)
        check_rows(1, model.mesh, "prompts read at a time")  # copies of a model have engines of their own
        self.model, self.limits, self._clock = model, limits, clock
        self.context = min(limits.context, model.config.max_position)
        chunk = model.decoder.step.prefill_buckets[-1]
        self._slots = Slots(model, limits.slots, -(-(self.context + MAX_BLOCK) // chunk) * chunk)
        axes = self._slots.axes
        self._cache = PrefixCache(axes, chunk, limits.cache_bytes) if axes and limits.cache_bytes else None
        self._reading: _Reading | None = None
        self._waiting = FairOrder[_Job]()
        self._jobs = dict[int, _Job]()  # by ticket
        self._job_of = dict[Text, _Job]()  # of those that decode
        self._tickets = itertools.count(1)
        self._changed = threading.Condition()  # also the lock of all above but what only the thread uses
        self._is_closing = self._is_cut = False
        self._came_round = clock()
        self._round_seconds, self._read_rate = VISIT_SECONDS, math.inf
        self._finished, self._tokens = Counter[str](), Counter[str]()
        self._accepted = [0] * (model.drafter.block_size - 1)
        self._warm_up()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: TokenRequest, sink: Sink) -> int:
        """See `requests.Serving`. The sink is called by the engine's thread, and returns at once."""
        self._check(request)
        with self._changed:
            if self._is_closing or not self._thread.is_alive():
                raise Busy("the engine is closing")
            self._check_room(request)
            self.accounts.enter(request.account)
            job = _Job(next(self._tickets), request, sink, self._clock())
            self._jobs[job.ticket] = job
            self._waiting.push(request.account, job)
            self._changed.notify()
            return job.ticket

    def cancel(self, ticket: int, sample: int | None = None) -> None:
        """See `requests.Serving`."""
        with self._changed:
            if job := self._jobs.get(ticket):
                job.unwanted.update(one for one in job.samples if sample in (None, one))
                self._changed.notify()

    def stats(self) -> Stats:
        """See `requests.Serving`."""
        with self._changed:
            return Stats(
                slots=self.limits.slots,
                running=len(self._slots.running),
                waiting=len(self._waiting) + (self._reading is not None),
                waiting_tokens=self._waiting_tokens(),
                cache_bytes=self._cache.bytes if self._cache else 0,
                cache_limit=self._cache.limit if self._cache else 0,
                idle_seconds=self._clock() - self._came_round,
                is_alive=self._thread.is_alive(),
                prompt_tokens=self._tokens["prompt"],
                cached_tokens=self._tokens["cached"],
                generated_tokens=self._tokens["generated"],
                rounds=self._tokens["rounds"],
                drafted_tokens=self._tokens["rounds"] * len(self._accepted),
                accepted_tokens=tuple(self._accepted),
                finished=dict(self._finished),
            )

    def close(self, grace: float = 0.0) -> None:
        """See `requests.Serving`."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(grace)
        with self._changed:
            self._is_cut = True
            self._changed.notify()
        self._thread.join()

    def _warm_up(self) -> None:
        """Compiles now what most requests need, so that none waits for it."""
        for strategy in {Greedy(), self.model.strategy}:
            job = _Job(0, TokenRequest((0,), 2, strategy), lambda update: None, self._clock())
            reader, text = self._reader(job, None), self._text(job, 0)
            reader.read()
            self._slots.enter(reader, text)
            self._slots.news()
            self._slots.visit(1, is_eager=True)
            self._slots.news()
            self._slots.leave(text)

    # What a request must be.

    def _check(self, request: TokenRequest) -> None:
        config = self.model.config
        if not request.prompt:
            raise UserError("prompt: empty; at least one token is needed")
        if len(request.prompt) >= self.context:
            raise TooLong(f"prompt: {len(request.prompt)} tokens; a row holds {self.context}, one of them generated")
        rows = (0, config.hidden_size) if request.media is None else request.media.rows_RD.shape
        if rows[1] != config.hidden_size:
            raise UserError(f"media: rows of width {rows[1]}; this model's have {config.hidden_size}")
        for name, ids, more in (("prompt", request.prompt, rows[0]), ("logit_bias", request.logit_bias, 0)):
            for token in ids:
                if type(token) is not int or not 0 <= token < config.vocab_size + more:
                    raise UserError(f"{name}: token id {token!r} is outside the vocabulary of {config.vocab_size}")

    def _check_room(self, request: TokenRequest) -> None:
        tokens = self._waiting_tokens() + len(request.prompt)
        if len(self._waiting) >= self.limits.waiting or tokens > self.limits.waiting_tokens:
            raise Busy(f"{len(self._waiting)} requests with {self._waiting_tokens()} tokens are waiting already")
        if tokens / self._read_rate > request.seconds:
            raise Busy(f"reading what waits takes {tokens / self._read_rate:.1f} s; {request.seconds:g} s were given")

    def _waiting_tokens(self) -> int:
        reading = self._reading  # the thread may end it meanwhile
        return (reading.reader.left if reading else 0) + sum(len(job.request.prompt) for job in self._waiting)

    # The thread.

    def _run(self) -> None:
        try:
            while self._wait():
                self._let_go()
                self._admit()
                if self._slots.running:
                    self._decode()
            self._end_all("cancelled")
        except Exception:
            _LOG.exception("the engine has failed")
            self._end_all("error")

    def _wait(self) -> bool:
        """Until there is something to do. False when there will be no more."""
        with self._changed:
            while not (self._jobs or self._is_closing):
                self._came_round = self._clock()
                self._changed.wait(IDLE_SECONDS)
            self._came_round = self._clock()
            return bool(self._jobs) and not self._is_cut

    def _let_go(self) -> None:
        """What nobody wants any more, or is late."""
        now = self._clock()
        with self._changed:
            late = [(job, sample) for job in self._jobs.values() if job.is_late(now) for sample in job.samples]
            unwanted = [(job, sample) for job in self._jobs.values() for sample in job.unwanted]
        finishes: tuple[Finish, Finish] = ("deadline", "cancelled")
        for finish, found in zip(finishes, (late, unwanted)):
            for job, sample in found:
                if sample not in job.ended:
                    self._end(job, sample, finish)

    def _admit(self) -> None:
        """Reads a chunk; and further prompts, as long as there are slots for them and a visit's time allows."""
        until = self._clock() + VISIT_SECONDS
        while True:
            self._read_on()
            self._fill_slots()
            is_busy = self._reading is not None or not self._slots.has_room
            if is_busy or not len(self._waiting) or self._clock() >= until:
                return

    def _read_on(self) -> None:
        """A chunk of the prompt whose turn it is."""
        if self._reading is None:
            self._reading = self._next_prompt()
        if self._reading is None or not self._reading.reader.left:
            return
        job, reader = self._reading.job, self._reading.reader
        left, began = reader.left, self._clock()
        reader.read()
        job.read = self._clock()
        rate = (left - reader.left) / max(job.read - began, LEAST_SECONDS)
        self._read_rate = rate if math.isinf(self._read_rate) else 0.8 * self._read_rate + 0.2 * rate

    def _next_prompt(self) -> _Reading | None:
        with self._changed:
            if not len(self._waiting):
                return None
            job = self._waiting.pop()
            self._waiting.charge(job.request.account, len(job.request.prompt))
        job.reading = self._clock()
        reader = self._reader(job, self._cache)
        job.cached = reader.cached
        self._tokens.update(prompt=len(job.request.prompt), cached=job.cached)
        return _Reading.of(job, reader)

    def _reader(self, job: _Job, cache: PrefixCache | None) -> Reader:
        slots, request = self._slots, job.request
        return Reader(slots.decoder, slots.weights, slots.capacity, request, cache)

    def _fill_slots(self) -> None:
        """Samples of the prompt that has been read take what slots are free."""
        if self._reading is None or self._reading.reader.left:
            return
        job, waiting = self._reading.job, self._reading.samples
        while waiting and self._slots.has_room:
            sample = waiting.popleft()
            if sample not in job.ended:
                text = self._text(job, sample)
                self._job_of[text] = job
                self._slots.enter(self._reading.reader, text)
        if not waiting:
            self._reading = None
        for news in self._slots.news():  # first tokens, which wait for no visit
            self._tell(news)

    def _text(self, job: _Job, sample: int) -> Text:
        request, model = job.request, self.model
        return Text(
            request,
            sample,
            min(request.max_tokens, self.context - len(request.prompt)),
            request.strategy or model.strategy,
            model.stop_ids if request.stop_ids is None else request.stop_ids,
            request.matcher() if request.matcher else None,
        )

    def _decode(self) -> None:
        """A visit: as many rounds as its time allows, fewer if a slot gets free that somebody waits for."""
        rounds = min(max(1, int(VISIT_SECONDS / self._round_seconds)), MOST_ROUNDS)
        began = self._clock()
        self._slots.visit(rounds, is_eager=bool(self._reading or len(self._waiting)))
        news = self._slots.news()
        seconds = max(self._clock() - began, LEAST_SECONDS) / rounds
        has_ended = any(each.finish for each in news)  # then there were fewer rounds, perhaps, and longer ones
        self._round_seconds = max(seconds, self._round_seconds) if has_ended else seconds
        for each in news:
            self._tell(each)

    def _tell(self, news: News) -> None:
        job = self._job_of[news.text]
        with self._changed:
            self._waiting.charge(job.request.account, len(news.tokens))
        if news.finish:
            self._end(job, news.text.sample, news.finish, news)
        else:
            usage = self._usage(job, news.text)
            self._send(job, Update(news.text.sample, news.tokens, news.logprobs, None, usage))

    def _end(self, job: _Job, sample: int, finish: Finish, news: News | None = None) -> None:
        """The last update of a sample, wherever it is; with the last one of a request that is over, too."""
        text = next((text for text, owner in self._job_of.items() if owner is job and text.sample == sample), None)
        usage = self._usage(job, text)
        if text is not None:
            self._keep(job, text)
            self._slots.leave(text)
            del self._job_of[text]
        self._count(finish, usage)
        with self._changed:
            job.ended[sample] = usage
            if len(job.ended) == len(job.samples):
                self._forget(job)
        tokens, logprobs = (news.tokens, news.logprobs) if news else ((), ())
        self._send(job, Update(sample, tokens, logprobs, finish, usage))

    def _keep(self, job: _Job, text: Text) -> None:
        """What was read and written is the beginning of the next turn, often."""
        if self._cache is not None and self._slots.decoder.step.groups_freely and text.tokens:
            tokens = (*job.request.known, *text.tokens[:-1])
            self._cache.keep(job.request.account, tokens, self._slots.caches_of(text))

    def _forget(self, job: _Job) -> None:
        del self._jobs[job.ticket]
        self.accounts.leave(job.request.account, *job.ended.values())
        if self._reading and self._reading.job is job:
            self._reading = None
        elif math.isnan(job.reading):
            self._waiting.remove(job)

    def _usage(self, job: _Job, text: Text | None) -> Usage:
        now = self._clock()
        reading, read = (now if math.isnan(when) else when for when in (job.reading, job.read))
        return Usage(
            prompt_tokens=len(job.request.prompt),
            cached_tokens=job.cached,
            generated_tokens=len(text.tokens) if text else 0,
            queue_seconds=reading - job.submitted,
            prefill_seconds=read - reading,
            decode_seconds=now - read,
            acceptance=text.acceptance if text else Acceptance(0, 0, [], []),
        )

    def _count(self, finish: Finish, usage: Usage) -> None:
        self._finished[finish] += 1
        self._tokens.update(generated=usage.generated_tokens, rounds=usage.acceptance.rounds)
        for position, accepted in enumerate(usage.acceptance.accepted):
            self._accepted[position] += accepted

    def _send(self, job: _Job, update: Update) -> None:
        try:
            job.sink(update)
        except Exception:
            _LOG.exception("a sink has failed; its request is cancelled")
            self.cancel(job.ticket)

    def _end_all(self, finish: Finish) -> None:
        with self._changed:
            self._is_closing = True
            left = [(job, sample) for job in self._jobs.values() for sample in job.samples if sample not in job.ended]
            for job in self._jobs.values():
                self.accounts.leave(job.request.account, *job.ended.values())
            self._jobs.clear()
        for job, sample in left:
            usage = self._usage(job, None)
            self._count(finish, usage)
            self._send(job, Update(sample, finish=finish, usage=usage))
