"""What many paths cost beside one, and what they gain where a compiler tells which of them is good."""

from __future__ import annotations

import ast
import dataclasses
import math
import statistics
import string
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from mimo_jax.cli.progress import progress
from mimo_jax.decode.sampling import Greedy, Strategy
from mimo_jax.errors import UserError
from mimo_jax.evaluation.speed import spread
from mimo_jax.loading import Model
from mimo_jax.paths import Best, Candidate, best_of, tree_search
from mimo_jax.serving.engine import Engine, Limits
from mimo_jax.tokenizer import END_OF_TEXT, Tokenizer

Record = dict[str, Any]
PATHS = (1, 4, 8, 16)
BEAM, BRANCH, STEP = 4, 4, 16  # of the tree, which has as many rows as the most paths
PROMPT_TOKENS = 128
NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)
# What begins a line outside of the function.
OUTSIDE = tuple("\n" + character for character in string.ascii_letters + string.digits + "_@#\"'([{")


def _engine(model: Model, slots: int, tokens: int, cache_bytes: int = 0) -> Engine:
    """For that many paths. Where nothing is kept of one prompt for the next, each of them is read anew."""
    return Engine(model, Limits(slots, PROMPT_TOKENS + tokens, cache_bytes))


def path_seconds(model: Model, prompts: list[list[int]], tokens: int) -> Record:
    """Seconds of 1, 4, 8 and 16 paths from the call to the last token, and of a tree of 16 rows whose forks are copied
    or read again; all of them beside one path, and the tokens they took. No path ends before it has all its tokens.

    Every prompt is a round, in which everything takes its turn; the first one compiles and does not count.
    """
    endless = dataclasses.replace(model, stop_ids=())
    rounds = list[dict[str, tuple[float, Best]]]()
    with ExitStack() as stack, progress("rounds", len(prompts)) as bar:

        def engine(slots: int, **options: int) -> Engine:
            return stack.enter_context(_engine(endless, slots, tokens, **options))

        runs: dict[str, Callable[..., Best]] = {str(n): partial(best_of, engine(n), n=n) for n in PATHS}
        tree = {"score": len, "beam": BEAM, "branch": BRANCH, "step": STEP}
        runs["tree"] = partial(tree_search, engine(BEAM * BRANCH, cache_bytes=Limits().cache_bytes), **tree)
        runs["tree, read again"] = partial(tree_search, engine(BEAM * BRANCH), **tree)
        for seed, prompt in enumerate(prompts):
            fields = {"prompt": prompt, "max_tokens": tokens, "seed": seed}
            rounds.append({name: _timed(partial(run, **fields)) for name, run in runs.items()})
            bar.advance(1)
    return {name: _costs([each[name] for each in rounds[1:]], [each["1"] for each in rounds[1:]]) for name in runs}


def _costs(found: list[tuple[float, Best]], ones: list[tuple[float, Best]]) -> Record:
    _, best = found[0]  # the others took about as many tokens
    return {
        "seconds": spread([seconds for seconds, _ in found]),
        "times one": spread([seconds / one for (seconds, _), (one, _) in zip(found, ones)]),
        "read tokens": best.read_tokens,
        "cached tokens": best.cached_tokens,
        "generated tokens": best.generated_tokens,
    }


def _timed(run: Callable[[], Best]) -> tuple[float, Best]:
    started = time.perf_counter()
    best = run()
    return time.perf_counter() - started, best


@dataclasses.dataclass(frozen=True)
class Function:
    """A held-out function without its body. The prompt ends with the header."""

    header: str
    prompt: list[int]

    def compiles(self, body: str) -> bool:
        try:
            compile(self.header + body, "function", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):  # the latter of null characters
            return False
        return True


def functions_of(tokens: np.ndarray, tokenizer: Tokenizer, count: int) -> list[Function]:
    """`count` of the functions at the top level of held-out files, evenly spaced; a prompt has 128 tokens at most."""
    ends = np.flatnonzero(tokens == tokenizer.id_of(END_OF_TEXT))
    files = [tokens[start:end] for start, end in zip([0, *(ends[:-1] + 1)], ends)]
    found = [each for file in files for each in _headers(tokenizer.decode(file.tolist()))]
    if len(found) < count:
        raise UserError(f"paths: {count} functions asked for, {len(found)} are held out")
    chosen = [found[place] for place in np.linspace(0, len(found) - 1, count).astype(int)]
    return [
        Function(header, tokenizer.encode(before + header, literal=True)[-PROMPT_TOKENS:]) for before, header in chosen
    ]


def _headers(source: str) -> Iterator[tuple[str, str]]:
    """Of each function at the top level of a file: what stands before it, and what of it stands before its body."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
            first = min(part.lineno for part in (node, *node.decorator_list)) - 1
            body = node.body[0].lineno - 1
            yield "".join(lines[:first]), "".join(lines[first:body])


def compiled(model: Model, functions: list[Function], n: int, strategy: Strategy, tokens: int) -> Record:
    """By way of writing a body: how many of all functions compile with it, and its seconds beside one sample's.

    A body ends before the first line outside of the function; one that does not within `tokens` tokens counts as it is.
    """
    with _engine(model, 1, tokens) as one, _engine(model, n, tokens) as many, progress("bodies", len(functions)) as bar:
        ways = {
            "one": _Way(one, 1, strategy),
            "one, greedy": _Way(one, 1, Greedy()),
            f"likeliest of {n}": _Way(many, n, strategy),
            f"best of {n}": _Way(many, n, strategy, is_tried=True),
        }
        rows = list[dict[str, _Body]]()
        for seed, function in enumerate([functions[0], *functions]):  # the first time compiles the programs
            rows.append({name: way.write(function, tokens, seed) for name, way in ways.items()})
            bar.advance(bool(seed))
    return {name: _summary([row[name] for row in rows[1:]], [row["one"] for row in rows[1:]]) for name in ways}


@dataclasses.dataclass(frozen=True)
class _Body:
    """One that was written; `tries` is how many samples there were up to the first that compiles, or all."""

    seconds: float
    winner: Candidate
    compiles: bool
    tries: int


@dataclasses.dataclass(frozen=True)
class _Way:
    engine: Engine
    n: int
    strategy: Strategy
    is_tried: bool = False  # compiling ranks

    def write(self, function: Function, tokens: int, seed: int) -> _Body:
        score = function.compiles if self.is_tried else None
        arguments = (self.engine, function.prompt, self.n, score, self.strategy)
        seconds, best = _timed(partial(best_of, *arguments, max_tokens=tokens, seed=seed, stop=OUTSIDE))
        numbers = [each.number for each in best.candidates if function.compiles(each.text)]
        return _Body(seconds, best.winner, best.winner.number in numbers, min(numbers, default=self.n - 1) + 1)


def _summary(bodies: list[_Body], ones: list[_Body]) -> Record:
    successes = sum(body.compiles for body in bodies)
    return {
        "compile": successes,
        "rate": successes / len(bodies),
        "interval": wilson(successes, len(bodies)),
        "ended": sum(body.winner.finish_reason == "stop" for body in bodies),
        "tokens": statistics.median(len(body.winner.tokens) for body in bodies),
        "tries": statistics.mean(body.tries for body in bodies),
        "seconds": spread([body.seconds for body in bodies]),
        "times one": spread([body.seconds / one.seconds for body, one in zip(bodies, ones)]),
    }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a rate, by Wilson's score."""
    rate, z2 = successes / trials, NORMAL_95**2 / trials
    middle = (rate + z2 / 2) / (1 + z2)
    half = NORMAL_95 / (1 + z2) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials))
    return middle - half, middle + half
