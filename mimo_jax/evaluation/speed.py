"""Measures speed. What is compared runs interleaved in one process: timings on shared machines are noisy."""

from __future__ import annotations

import collections
import gzip
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.decode.sampling import Greedy, Strategy
from mimo_jax.evaluation.references import build_reference, load_weights
from mimo_jax.generation import Request, encode_prompt, generate, stream
from mimo_jax.loading import Model, load, load_dense

Record = dict[str, Any]


def decode_runs(directory: Path, prompt: str, count: int, with_transformers: bool) -> dict[str, Callable[[], Any]]:
    """Greedy decoding of `count` tokens, by name: native code, the modules under XLA, transformers."""
    models = {layout: load(directory, layout=layout, draft="none") for layout in ("native", "dense")}
    ids = list(encode_prompt(models["native"], prompt).ids)
    runs: dict[str, Callable[[], Any]] = {
        layout: partial(generate, model, ids, Greedy(), max_tokens=count) for layout, model in models.items()
    }
    return runs | ({"transformers": transformers_run(directory, ids, count)} if with_transformers else {})


def transformers_run(directory: Path, prompt: list[int], count: int) -> Callable[[], Any]:
    """Greedy decoding of the same weights by transformers, with its cache."""
    import torch

    torch.set_grad_enabled(False)
    model = load_dense(directory)
    reference = build_reference(model.config)
    load_weights(reference, model.config, model.params)
    tokens = torch.tensor([prompt])
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return lambda: reference.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int, tokens: int) -> dict[str, dict[str, float]]:
    """Milliseconds per token of each run: the median of `repeats`, and the range."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # compiles
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - started) / tokens)
    return {name: spread([1e3 * value for value in values], "ms_per_token") for name, values in seconds.items()}


def spread(values: list[float], name: str = "median") -> dict[str, float]:
    """The median, under a name, and the range."""
    return {name: statistics.median(values), "lowest": min(values), "highest": max(values)}


def speculation(models: dict[str, Model], prompts: list[list[int]], strategy: Strategy, **fields: Any) -> Record:
    """Per model: tokens per second, a round in units of a plain one, and the speed-up over `models["plain"]`.

    The speed-up has the half-width of its 95 % interval over prompts. The first prompt compiles and does not count;
    `fields` are those of a `Request`.
    """
    timings: dict[str, list] = {name: [] for name in models}
    for number, prompt in enumerate(prompts):
        for name, model in models.items():
            result = generate(model, prompt, strategy, **fields)
            if number:
                counted = result.acceptance
                timings[name].append((result.timing.decode_seconds, counted.tokens, counted.rounds))
    totals = {name: np.array(rows, float) for name, rows in timings.items()}
    return {name: _speedup(rows, totals["plain"]) for name, rows in totals.items()}


def _speedup(rows: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """Of (seconds, tokens, rounds) per prompt, beside those of plain decoding."""
    seconds, tokens, rounds = rows.sum(axis=0)
    decoded = (rows[:, 1] > 0) & (plain[:, 1] > 0)  # a text may end with the token that the prefill gives
    ratios = (rows[decoded, 1] / rows[decoded, 0]) / (plain[decoded, 1] / plain[decoded, 0])
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_round": tokens / rounds,
        "round_over_one_token": seconds / rounds / (plain[:, 0].sum() / plain[:, 2].sum()),
        "speedup": (tokens / seconds) / (plain[:, 1].sum() / plain[:, 0].sum()),
        "speedup_half_width": 1.96 * float(np.std(ratios, ddof=1)) / len(ratios) ** 0.5,
    }


def streaming(model: Model, prompt: str, lengths: list[int], repeats: int) -> Record:
    """Per length: what streaming a greedy text costs over making it in one visit, as ratios of decoding seconds."""
    ids, record = list(encode_prompt(model, prompt).ids), {}
    for length in lengths:
        request, ratios = Request(ids, Greedy(), max_tokens=length), []
        for number in range(repeats + 1):
            whole = generate(model, request).timing.decode_seconds
            *_, last = stream(model, request)
            if number and last.result is not None:  # the first ones compile
                ratios.append(last.result.timing.decode_seconds / whole)
        record[str(length)] = spread(ratios, "ratio")
    return record


def profile(model: Model, prompt: str, count: int, trace: Path, rows: int = 20) -> dict[str, float]:
    """Microseconds per token of the slowest operations of greedy decoding; the trace stays in its folder."""
    generate(model, prompt, Greedy(), max_tokens=count)
    with jax.profiler.trace(str(trace)):
        generate(model, prompt, Greedy(), max_tokens=count)
    (newest, *_) = sorted(trace.rglob("*.trace.json.gz"), reverse=True)
    total: collections.Counter = collections.Counter()
    for event in json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            total[event["name"].split(".")[0]] += event["dur"]
    return {name: micros / count for name, micros in total.most_common(rows)}
