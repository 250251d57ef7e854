"""Counters, gauges and histograms in Prometheus' text format, under the names that dashboards read."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mimo_jax.errors import UserError
from mimo_jax.serving.accounts import Tokens
from mimo_jax.serving.requests import Stats, Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[str, Mapping[str, str], float]  # what follows the family's name, labels, value


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A family that is read from the engine at each scrape: one value, or one for each value of a label."""

    name: str
    kind: str
    help: str
    read: Callable[[Stats], float | Mapping[str, float]]
    label: str = ""

    def samples(self, stats: Stats) -> list[Sample]:
        value = self.read(stats)
        return _by_label(self.label, value) if isinstance(value, Mapping) else [("", {}, value)]


def _positions(stats: Stats) -> dict[str, float]:
    return {str(position): count for position, count in enumerate(stats.accepted_tokens)}


_READINGS = (
    _Reading("num_requests_running", "gauge", "Samples in a slot.", lambda s: s.running),
    _Reading("num_requests_waiting", "gauge", "Samples in the queue.", lambda s: s.waiting),
    _Reading(
        *("kv_cache_usage_perc", "gauge", "Part of the prefix cache that is in use, 0 to 1."),
        lambda s: s.cache_bytes / max(s.cache_limit, 1),
    ),
    _Reading("prefix_cache_queries_total", "counter", "Prompt tokens looked up.", lambda s: s.prompt_tokens),
    _Reading("prefix_cache_hits_total", "counter", "Prompt tokens found.", lambda s: s.cached_tokens),
    _Reading("prompt_tokens_total", "counter", "Prompt tokens, cached ones included.", lambda s: s.prompt_tokens),
    _Reading("prompt_tokens_cached_total", "counter", "Prompt tokens not read anew.", lambda s: s.cached_tokens),
    _Reading("generation_tokens_total", "counter", "Tokens generated.", lambda s: s.generated_tokens),
    _Reading("request_success_total", "counter", "Samples ended.", lambda s: s.finished, "finished_reason"),
    _Reading(
        "spec_decode_num_drafts_total", "counter", "Blocks drafted.", lambda s: s.rounds * bool(s.accepted_tokens)
    ),
    _Reading("spec_decode_num_draft_tokens_total", "counter", "Tokens drafted.", lambda s: s.drafted_tokens),
    _Reading(
        *("spec_decode_num_accepted_tokens_total", "counter", "Drafted tokens accepted."),
        lambda s: sum(s.accepted_tokens),
    ),
    _Reading(
        *("spec_decode_num_accepted_tokens_per_pos_total", "counter", "Drafted tokens accepted, by position."),
        *(_positions, "position"),
    ),
)

# Upper bounds of buckets.
_SECONDS = (*(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2.5, 5)), 1000.0, 2000.0)
_TOKEN_SECONDS = (*(digit * 10.0**power for power in range(-4, 0) for digit in (1, 2.5, 5)), 1.0)
_TOKENS = (*(digit * 10.0**power for power in range(6) for digit in (1, 2, 5)), 1e6)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From submission to the first token.", _SECONDS),
    "inter_token_latency_seconds": ("Per token after the first ones.", _TOKEN_SECONDS),
    "e2e_request_latency_seconds": ("From submission to the end.", _SECONDS),
    "request_queue_time_seconds": ("From submission to prefill.", _SECONDS),
    "request_prefill_time_seconds": ("From prefill to the first token.", _SECONDS),
    "request_decode_time_seconds": ("From the first token to the end.", _SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a sample.", _TOKENS),
}


class _Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def samples(self) -> Iterator[Sample]:
        for bound, count in zip((*self._bounds, math.inf), itertools.accumulate(self._counts)):
            yield "_bucket", {"le": _number(bound)}, count
        yield "_sum", {}, self._sum
        yield "_count", {}, sum(self._counts)


class Metrics:
    """Any thread may call it. With the prefix "vllm:", dashboards made for vLLM find what they look for."""

    def __init__(self, model_name: str, prefix: str = "mimo:") -> None:
        if not re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)?", prefix):
            raise UserError(f"metrics: prefix={prefix!r} must be letters, digits, _ and :, and not begin with a digit")
        self._labels, self._prefix, self._lock = {"model_name": model_name}, prefix, threading.Lock()
        self._histograms = {name: _Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self._rejections = Counter[str]()
        self._accounts = dict[str, Tokens]()

    def observe(self, usage: Usage, arrivals: Sequence[tuple[float, int]] = ()) -> None:
        """A sample has ended. `arrivals`: of each update with tokens, seconds on any clock, and how many tokens."""
        first = usage.queue_seconds + usage.prefill_seconds
        values = {
            "e2e_request_latency_seconds": first + usage.decode_seconds,
            "request_queue_time_seconds": usage.queue_seconds,
            "request_prompt_tokens": usage.prompt_tokens,
            "request_generation_tokens": usage.generated_tokens,
        }
        if usage.generated_tokens:  # else it had no first token
            values["time_to_first_token_seconds"] = first
            values["request_prefill_time_seconds"] = usage.prefill_seconds
            values["request_decode_time_seconds"] = usage.decode_seconds
        with self._lock:
            for name, value in values.items():
                self._histograms[name].add(value)
            for (before, _), (now, tokens) in itertools.pairwise(arrivals):
                self._histograms["inter_token_latency_seconds"].add((now - before) / tokens, tokens)

    def reject(self, reason: str) -> None:
        """A request was not admitted, for one of few reasons."""
        with self._lock:
            self._rejections[reason] += 1

    def usage(self, account: str, *samples: Usage) -> None:
        """What a request's samples took. Without accounts all is that of "", and not shown."""
        if account:
            with self._lock:
                self._accounts[account] = self._accounts.get(account, Tokens()) + Tokens.of(samples)

    def render(self, stats: Stats) -> str:
        """What a scrape reads."""
        lines = [line for row in _READINGS for line in self._family(row.name, row.kind, row.help, row.samples(stats))]
        with self._lock:
            rejections = _by_label("reason", self._rejections)
            lines += self._family("admission_rejections_total", "counter", "Requests not admitted.", rejections)
            for name, (description, _) in _HISTOGRAMS.items():
                lines += self._family(name, "histogram", description, self._histograms[name].samples())
            if self._accounts:
                lines += self._family("account_tokens_total", "counter", "Tokens by account.", self._account_samples())
        return "\n".join(lines) + "\n"

    def _account_samples(self) -> Iterator[Sample]:
        for account, tokens in self._accounts.items():
            for kind, count in dataclasses.asdict(tokens).items():
                yield "", {"account": account, "kind": kind}, count

    def _family(self, name: str, kind: str, description: str, samples: Iterable[Sample]) -> Iterator[str]:
        name = self._prefix + name
        yield f"# HELP {name} {description}"
        yield f"# TYPE {name} {kind}"
        for suffix, labels, value in samples:
            pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**self._labels, **labels}.items())
            yield f"{name}{suffix}{{{pairs}}} {_number(value)}"


def _by_label(label: str, values: Mapping[str, float]) -> list[Sample]:
    return [("", {label: text}, value) for text, value in values.items()]


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else repr(value)
