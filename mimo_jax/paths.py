"""Many paths in the time of one: samples of a prompt that are ranked, and a tree of texts that a score prunes.

with mimo.Engine(mimo.load(), mimo.Limits(slots=8)) as engine:
    best = mimo.best_of(engine, "def fib(n):", 8, score=compiles)
    best = mimo.tree_search(engine, "def fib(n):", compiles, step="\\n")
print(best.winner.text)

Rows decode together, up to the engine's slots; what texts have in common is read once.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import reprlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from mimo_jax.decode.sampling import Strategy
from mimo_jax.errors import UserError, check_whole
from mimo_jax.generation import Prompt, Request, as_request, encode_prompt
from mimo_jax.serving.engine import Engine
from mimo_jax.serving.requests import MOST_SAMPLES, MOST_SEED, TokenRequest, Update
from mimo_jax.text import Transcript
from mimo_jax.tokenizer import Tokenizer

MOST_TEXTS = 64  # of a beam
Score = Callable[[str], float]  # of what was generated, without the prompt; more is better


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A text that has ended. `number` says when it was forked; it breaks the last ties, and the lower one wins."""

    text: str
    tokens: tuple[int, ...]
    mean_logprob: float  # of its tokens, those that end it included, in nats, before temperature and filters
    score: float
    finish_reason: str  # "stop" or "length"
    number: int


@dataclasses.dataclass(frozen=True)
class Best:
    """Candidates, the best first, and the tokens they took."""

    candidates: tuple[Candidate, ...]
    read_tokens: int  # of prompts, and of texts that were forked
    cached_tokens: int  # of the same, that were copied and not read
    generated_tokens: int  # those after a stop string, and those of texts that were dropped, included

    @property
    def winner(self) -> Candidate:
        return self.candidates[0]


def best_of(
    engine: Engine,
    prompt: Prompt | Request,
    n: int,
    score: Score | None = None,
    strategy: Strategy | None = None,
    extract: Callable[[str], Hashable | None] | None = None,
    **fields: Any,
) -> Best:
    """Samples `n` texts, which share one reading of the prompt, and ranks them.

    Sample i is what `generate` makes with `seed` + i; `fields` are those of `Request`: max_tokens, seed, stop. The rank
    is the mean log-probability; or what `score` says of a text; or how many samples agree on the answer that `extract`
    finds in a text, None if there is none. Ties go to the higher mean log-probability.
    """
    check_whole("best_of", 1, MOST_SAMPLES, n=n)
    if score and extract:
        raise UserError("best_of: score and extract both rank; give one of them")
    forks = _Forks(engine, as_request(prompt, strategy, **fields))
    paths = forks([forks.root], n)
    texts = [path.transcript.text for path in paths]
    if score:
        scores = [_scored(score, text) for text in texts]
    else:
        scores = _votes(extract, texts) if extract else [path.mean_logprob for path in paths]
    return forks.best(list(zip(paths, scores)))


def tree_search(
    engine: Engine,
    prompt: Prompt | Request,
    score: Score,
    strategy: Strategy | None = None,
    beam: int = 4,
    branch: int = 4,
    step: int | str = 16,
    **fields: Any,
) -> Best:
    """Beam search over texts under way: each goes on in `branch` ways for a step, and the `beam` best ones go on.

    A `step` is a number of tokens, or ends with the token in which that string is complete, such as a line. `score`
    sees what is settled of a text: no half characters. A text that has ended leaves the beam and stays a candidate.
    Ways that are the same, token for token, count once. The k-th way of all is drawn with `seed` + k, so a seed decides
    everything. Beside the native step a fork reads one token; elsewhere what is left after whole chunks.
    """
    check_whole("tree_search", 1, MOST_TEXTS, beam=beam)
    check_whole("tree_search", 1, MOST_SAMPLES, branch=branch)
    if step == "":
        raise UserError("step: an empty string would end no step")
    if not isinstance(step, str):
        check_whole("tree_search", 1, step=step)
    forks = _Forks(engine, as_request(prompt, strategy, **fields), step)
    ended, running = list[tuple[_Path, float]](), [forks.root]
    while running:
        unique = dict[tuple[int, ...], _Path]()
        for path in forks(running, branch):
            unique.setdefault(tuple(path.tokens), path)
        scored = [(path, _scored(score, path.text)) for path in unique.values()]
        ended += [each for each in scored if each[0].is_ended]
        ranked = sorted((each for each in scored if not each[0].is_ended), key=_rank)
        running = [path for path, _ in ranked[:beam]]
    return forks.best(ended)


def _scored(score: Score, text: str) -> float:
    value = score(text)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise UserError(f"score: gave {reprlib.repr(value)} for a text; it must give a number")
    return number


def _votes(extract: Callable[[str], Hashable | None], texts: Sequence[str]) -> list[float]:
    """How many texts give the answer of each; without an answer, none do."""
    answers = [extract(text) for text in texts]
    try:
        votes = Counter(answers)
    except TypeError:
        raise UserError("extract: an answer must be hashable, such as a text or a tuple, not a list") from None
    return [0.0 if answer is None else float(votes[answer]) for answer in answers]


class _Path:
    """A text under way. It takes token by token, so that where it ends does not depend on how many come at once."""

    def __init__(self, number: int, tokens: list[int], logprob: float, whole: Transcript, line: Transcript) -> None:
        self.number, self.tokens, self.logprob = number, tokens, logprob  # the sum
        self.transcript = whole
        self.is_ended = False
        self._line, self._since = line, list[int]()  # of what is new since it was forked
        whole.update(tokens)

    @property
    def mean_logprob(self) -> float:
        return self.logprob / len(self.tokens)

    @property
    def text(self) -> str:
        return self.transcript.text if self.is_ended else self.transcript.settled

    @property
    def is_over(self) -> bool:
        """For this step."""
        return self.transcript.is_stopped or self._line.is_cut

    def take(self, update: Update) -> None:
        for token, logprob in zip(update.tokens, update.logprobs):
            if self.is_over:
                return
            self.logprob += logprob.logprob
            for tokens, transcript in ((self.tokens, self.transcript), (self._since, self._line)):
                tokens.append(token)
                transcript.update(tokens)


def _rank(scored: tuple[_Path, float]) -> tuple[float, float, int]:
    path, score = scored
    return -score, -path.mean_logprob, path.number


class _Forks:
    """Continues texts of one request, and counts what that took."""

    def __init__(self, engine: Engine, request: Request, step: int | str | None = None) -> None:
        self._engine, self._model, self._request = engine, engine.model, request
        encoded = encode_prompt(engine.model, request.prompt, request.literal)
        self._prompt, self._media = encoded.ids, encoded.media
        self._limit = min(request.max_tokens, engine.context - len(self._prompt))
        self._step = step if isinstance(step, int) else request.max_tokens
        self._line = [step] if isinstance(step, str) else []
        # The engine stops at most ends of a step by itself; of one that tokens share, the path finds out.
        line_ends = _containing(self._model.tokenizer, step) if isinstance(step, str) else ()
        self._stop_ids = (*self._model.stop_ids, *line_ends)
        self._read = self._cached = self._generated = self._count = 0
        self.root = self._path(0, [], 0.0)

    def __call__(self, parents: Sequence[_Path], samples: int) -> list[_Path]:
        """What each goes on with in the next step, in `samples` ways."""
        updates, tickets = queue.SimpleQueue[tuple[int, Update]](), list[int]()
        forks = [[self._fork(parent) for _ in range(samples)] for parent in parents]
        try:
            for index, (parent, (first, *_)) in enumerate(zip(parents, forks)):
                request = self._continuing(parent, first.number, samples)
                tickets.append(self._engine.submit(request, lambda update, index=index: updates.put((index, update))))
            left = len(parents) * samples
            while left:
                index, update = updates.get()
                path = forks[index][update.sample]
                path.take(update)
                if update.finish:
                    self._end(path, update)
                    left -= 1
                elif path.is_over:
                    self._engine.cancel(tickets[index], update.sample)
        finally:
            for ticket in tickets:
                self._engine.cancel(ticket)  # of no effect after the end
        return [path for group in forks for path in group]

    def best(self, scored: list[tuple[_Path, float]]) -> Best:
        candidates = [
            Candidate(
                path.transcript.text,
                tuple(path.transcript.tokens),
                path.mean_logprob,
                score,
                "stop" if path.transcript.is_stopped else "length",
                path.number,
            )
            for path, score in sorted(scored, key=_rank)
        ]
        return Best(tuple(candidates), self._read, self._cached, self._generated)

    def _path(self, number: int, tokens: list[int], logprob: float) -> _Path:
        tokenizer = self._model.tokenizer
        whole = Transcript(tokenizer, self._model.stop_ids, self._request.stop)
        return _Path(number, tokens, logprob, whole, Transcript(tokenizer, (), self._line))

    def _fork(self, parent: _Path) -> _Path:
        self._count += 1
        return self._path(self._count - 1, [*parent.tokens], parent.logprob)

    def _continuing(self, parent: _Path, number: int, samples: int) -> TokenRequest:
        return TokenRequest(
            (*self._prompt, *parent.tokens),
            min(self._step, self._request.max_tokens - len(parent.tokens)),
            self._request.strategy,
            (self._request.seed + number) % (MOST_SEED + 1),
            samples,
            self._stop_ids,
            top_logprobs=0,
            media=self._media,
        )

    def _end(self, path: _Path, update: Update) -> None:
        if update.finish == "error" or (update.finish == "cancelled" and not path.is_over):
            raise UserError("engine: it failed, or was closed; its texts are lost")
        path.is_ended = path.transcript.is_stopped or len(path.tokens) >= self._limit
        assert update.usage is not None
        self._generated += update.usage.generated_tokens
        if update.sample == 0:  # samples share their prompt
            self._cached += update.usage.cached_tokens
            self._read += update.usage.prompt_tokens - update.usage.cached_tokens


def _containing(tokenizer: Tokenizer, string: str) -> list[int]:
    return [token for token in range(tokenizer.vocab_size) if string in tokenizer.decode([token])]
