"""The native step's speed: beside llama.cpp in one interleaved run, and what a block costs in plain steps."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoint.huggingface import read_hf_config
from mimo_jax.config.model import ModelConfig
from mimo_jax.decode import loop
from mimo_jax.decode.sampling import Greedy, Sampled, Strategy
from mimo_jax.decode.step import FusedStep
from mimo_jax.drafters.fused_dflash import FusedDFlashDrafter
from mimo_jax.errors import UserError
from mimo_jax.evaluation import llama_cpp
from mimo_jax.evaluation.speed import spread
from mimo_jax.generation import generate_batch
from mimo_jax.layouts.native import NATIVE
from mimo_jax.loading import Model, load
from mimo_jax.weights.params import part_bytes, weights
from pallas_kernels.decode_step import NORMALLY, Running, read_stream, usable_paths

Record = dict[str, Any]
DEPTH, TOKENS = 192, 128  # of one-by-one decoding: context from 192 to 320
BLOCK, BLOCKS, BLOCK_DEPTH = 8, 32, 128  # of reading in blocks: context from 128 to 384
STREAMS = 200  # plain reads of a measurement
PROMPT, QUESTION = 512, 32  # of reading a prompt: a long one, and what a chat begins with


def prompt_of(model: Model, length: int, seed: int = 0) -> list[int]:
    """Random token ids that end no text and stand for no row of media."""
    ids, media = np.random.default_rng(seed).integers(1, model.config.vocab_size, 2 * length), model.config.media
    left_out = {*model.stop_ids, *(media.rows if media else ())}
    return [int(token) for token in ids if token not in left_out][:length]


def plain_rate(
    model: Model, batch: int = 1, depth: int = DEPTH, tokens: int = TOKENS, strategy: Strategy = Greedy()
) -> float:
    """Tokens per second of the loop that generates, all rows together; texts do not end."""
    endless = dataclasses.replace(model, stop_ids=())
    prompts = [prompt_of(model, depth, seed) for seed in range(batch)]
    timing = generate_batch(endless, prompts, strategy, max_tokens=tokens)[0].timing
    return timing.generated_tokens / timing.decode_seconds


def strategy_rates(model: Model, repeats: int) -> Record:
    """Tokens per second one by one: greedy, sampled, and as the checkpoint wants to be sampled; interleaved."""
    strategies = {"greedy": Greedy(), "sampled": Sampled(), "generation_config.json": model.strategy}
    return interleaved({name: partial(plain_rate, model, strategy=of) for name, of in strategies.items()}, repeats)


def spread_of(rate: Callable[[], float], repeats: int) -> dict[str, float]:
    """Of several measurements, after one that compiles."""
    rate()
    return spread([rate() for _ in range(repeats)])


def interleaved(rates: dict[str, Callable[[], float]], repeats: int) -> Record:
    """The spread of each over `repeats` turns, after one that compiles."""
    turns = [{name: rate() for name, rate in rates.items()} for _ in range(repeats + 1)]
    return {name: spread([turn[name] for turn in turns[1:]]) for name in rates}


def prefill_rate(model: Model, length: int = PROMPT) -> float:
    """Prompt tokens per second, up to the first token."""
    decoder, prompt = model.decoder, prompt_of(model, length)
    capacity = loop.capacity_for(length)
    started = time.perf_counter()
    jax.block_until_ready(loop.prefill(decoder, model.weights, [prompt], capacity))
    return length / (time.perf_counter() - started)


def block_rate(
    model: Model, block: int = BLOCK, blocks: int = BLOCKS, depth: int = BLOCK_DEPTH, running: Running = NORMALLY
) -> float:
    """Tokens per second of a target that reads block after block and shows all logits: what verifying costs."""
    step = FusedStep(model.config, running=running)
    decoder = dataclasses.replace(model.decoder, step=step)
    prompt, tokens = prompt_of(model, depth), np.array([prompt_of(model, block, 1)], np.int32)
    capacity = loop.capacity_for(depth + block * blocks)
    cache, _, _ = jax.block_until_ready(loop.prefill(decoder, model.weights, [prompt], capacity))
    started = time.perf_counter()
    jax.block_until_ready(_read_blocks(step, model.params, tokens, cache, blocks))
    return block * blocks / (time.perf_counter() - started)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=3)
def _read_blocks(step, params, tokens_1T, cache, blocks):
    counts_1 = jnp.full(1, tokens_1T.shape[1], jnp.int32)

    def body(_, carry):
        tokens_1T, cache = carry
        _, features, cache = step(params, tokens_1T, cache, counts_1)
        return features.best, cache  # each block depends on the one before, as in decoding

    return jax.lax.fori_loop(0, blocks, body, (tokens_1T, cache))[1]


def path_rates(model: Model, repeats: int) -> Record:
    """Tokens per second one by one and in blocks of 8, of each instruction-set path of this machine, interleaved."""
    rates = {
        f"{path}, blocks of {size}": partial(
            block_rate, model, size, BLOCKS * BLOCK // size // 2, running=Running(path)
        )
        for path in usable_paths()
        for size in (1, BLOCK)
    }
    return interleaved(rates, repeats)


def beside_llama_cpp(directory: Path, folder: Path, rounds: int, threads: int, gguf: Path | None = None) -> Record:
    """Medians over interleaved rounds of both rates and of their ratio, with the ranges.

    llama.cpp gets its faster type of cache for each kind of work, found in the first round; and the file `gguf` that
    the checkpoint was made from, or else the checkpoint converted.
    """
    model = load(directory, draft="none")
    if model.layout != "native":
        raise UserError(f"benchmark: the native step is to be measured, and this is layout {model.layout!r}")
    bench, file = llama_cpp.build(folder), gguf or folder / f"{directory.resolve().name}.gguf"
    if gguf is None:
        llama_cpp.convert(directory, file)
    theirs = partial(llama_cpp.rates, bench, file, threads=threads, repeats=3)
    works: dict[str, tuple[Callable[[], float], dict[str, int]]] = {
        "plain": (lambda: plain_rate(model), {"generate": TOKENS, "depth": DEPTH}),
        "blocks of 8": (lambda: block_rate(model), {"prompt": BLOCK * BLOCKS, "batch": BLOCK, "depth": BLOCK_DEPTH}),
        **{f"prefill of {size}": (partial(prefill_rate, model, size), {"prompt": size}) for size in (PROMPT, QUESTION)},
    }
    record: Record = {}
    for name, (ours, work) in works.items():
        ours()  # compiles
        caches = {cache: statistics.median(theirs(cache=cache, **work)) for cache in ("f16", "bf16")}
        cache = max(caches, key=lambda cache: caches[cache])
        pairs = [(ours(), statistics.median(theirs(cache=cache, **work))) for _ in range(rounds)]
        record[name] = {
            "ours": spread([first for first, _ in pairs]),
            "llama.cpp": spread([second for _, second in pairs]),
            "ratio": spread([first / second for first, second in pairs]),
            "llama.cpp's cache": cache,
        }
    return record


def block_costs(plain: Model, drafting: Model, prompts: list[list[int]], tokens: int, rounds: int) -> Record:
    """Per block size: tokens per round, what verifying and a whole round cost in plain steps, and the speed-up.

    Everything is greedy, and interleaved over `rounds`; the prompts are those of the speed-up.
    """
    drafter = drafting.drafter
    if not isinstance(drafter, FusedDFlashDrafter):
        raise UserError("benchmark: no drafter to be measured beside the native step")
    sizes = range(2, drafter.block_size + 1)
    models = {size: _with_block(drafting, drafter, size) for size in sizes}
    record: Record = {}
    for size, model in models.items():
        ratios, verify = [], []
        for turn in range(rounds + 1):
            one = _round_seconds(plain, prompts, tokens)
            found = _round_seconds(model, prompts, tokens)
            block = size / block_rate(plain, size) / one["round"]
            if turn:  # the first compiles
                ratios.append((found["rate"] / one["rate"], found["round"] / one["round"], found["tokens"]))
                verify.append(block)
        speedups, costs, accepted = zip(*ratios)
        record[str(size)] = {
            "tokens per round": statistics.median(accepted),
            "verifying, plain steps": statistics.median(verify),
            "round, plain steps": statistics.median(costs),
            "times plain": spread(list(speedups)),
        }
    return record


def _with_block(model: Model, drafter: FusedDFlashDrafter, size: int) -> Model:
    """That proposes whole blocks of `size`."""
    config = dataclasses.replace(drafter.config, block_size=size)
    return dataclasses.replace(model, drafter=dataclasses.replace(drafter, config=config, confidence=0.0))


def _round_seconds(model: Model, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Of decoding each prompt by itself: tokens per second, seconds per round, tokens per round."""
    results = [generate_batch(model, [prompt], Greedy(), max_tokens=tokens)[0] for prompt in prompts]
    seconds = sum(result.timing.decode_seconds for result in results)
    made, rounds = (sum(getattr(result.acceptance, name) for result in results) for name in ("tokens", "rounds"))
    return {"rate": made / seconds, "round": seconds / rounds, "tokens": made / rounds}


def roofline(model: Model, size: int, repeats: int) -> Record:
    """What a plain step reads over its time, against a plain read of as many bytes of weights.

    A step reads `size` bytes of weights and, half-way through what is generated, so many keys and values.
    """
    size += cache_bytes(model.config, DEPTH + TOKENS // 2)
    read_bytes = min(size, model.params[NATIVE].bytes.size)
    fractions, steps, reads = [], [], []
    for turn in range(repeats + 1):
        step = 1 / plain_rate(model)
        started = time.perf_counter()
        jax.block_until_ready(_stream(model.params[NATIVE], read_bytes))
        read = (time.perf_counter() - started) / STREAMS * size / read_bytes
        if turn:  # the first compiles
            fractions.append(read / step), steps.append(size / step / 1e9), reads.append(size / read / 1e9)
    return {
        "bytes per step": size,
        "step, GB/s": spread(steps),
        "streaming read, GB/s": spread(reads),
        "fraction": spread(fractions),
    }


@partial(jax.jit, static_argnums=1)
def _stream(weights: Any, size: int) -> jax.Array:
    """Reads so many bytes, one time after another, as steps follow each other."""

    def again(_: int, before: jax.Array) -> jax.Array:
        return read_stream(weights, size, before)

    return jax.lax.fori_loop(1, STREAMS, again, read_stream(weights, size))


def cache_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of keys and values in float32 that a token reads after `context` others."""
    return 4 * config.cached_numbers(context, min(context, config.sliding_window))


def active_bytes(directory: Path) -> int:
    """Bytes of weights that one token reads: all of the text model but the embedding; of experts the chosen ones."""
    config, file_format = read_hf_config(directory)
    total = 0.0
    for weight in weights(dataclasses.replace(config, mtp_layers=0, vision=None, audio=None, media=None), file_format):
        share = config.experts_per_token / config.num_experts if weight.row.kind == "expert" else 1
        total += 0 if weight.label == "embed" else share * sum(map(part_bytes, weight.parts))
    return int(total)
