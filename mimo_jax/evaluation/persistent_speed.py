"""The persistent kernel on one GPU that holds a share of a model: what a round takes, and each kind of its rows."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config.geometry import target_of
from mimo_jax.config.model import ModelConfig
from mimo_jax.config.presets import preset
from mimo_jax.decode.persistent_step import Row, launcher
from mimo_jax.errors import UserError
from mimo_jax.evaluation.slice import share, streaming_read
from mimo_jax.evaluation.speed import spread
from mimo_jax.layouts.persistent import PERSISTENT, rotary_tables
from mimo_jax.loading import load
from pallas_kernels import persistent
from pallas_kernels.decode_step import ROLES
from pallas_kernels.devices import on_hopper
from pallas_kernels.hardware import GPUS
from pallas_kernels.persistent import MOST_TOKENS, PUBLISHED, STAMPS, Buffers, Kind, Op, StepPlan, Table, Weights

POISONED = ("x", "squares", "qkv", "partial", "scores", "logits", "last")  # floats that a round writes before it reads
AT_ONCE = 500  # rounds of one program
LENGTH, CAPACITY = 100, 256  # of the text that is soaked in
Record = dict[str, Any]


def hashed(shape: tuple[int, ...], kept: int, added: int) -> jax.Array:
    """int32 of that shape: bits of a hash of each word's place where `kept` has ones, and those of `added`."""

    def make() -> jax.Array:
        word = jnp.full(shape, 0x9E3779B9, jnp.uint32)
        for axis in range(len(shape)):
            word = (word ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * np.uint32(0x85EBCA6B)
            word = word ^ word >> 13
        return jax.lax.bitcast_convert_type(word & np.uint32(kept) | np.uint32(added), jnp.int32)

    return jax.jit(make)()


@partial(jax.jit, donate_argnums=0, static_argnums=(1, 2, 3))
def with_scales(words: jax.Array, tile: int, codes: int, scale: int) -> jax.Array:
    """Every tile of so many words ends in scales, after its codes."""
    place = jax.lax.broadcasted_iota(jnp.int32, words.shape, words.ndim - 1) % tile
    return jnp.where(place < codes, words, np.int32(scale))


def random_weights(config: ModelConfig, plan: StepPlan) -> Weights:
    """Codes and numbers of random bits, of sizes that keep sums of thousands of products near one."""
    shapes = persistent.weight_shapes(plan)
    numbers = {"bf16": (0x807F807F, 0x3C003C00), "fp8": (0xBFBFBFBF, 0), "mxfp4": (0xFFFFFFFF, 0)}
    scales = {"fp8": persistent.scale_word("fp8", -7), "mxfp4": persistent.scale_word("mxfp4", -8)}

    def matrix(kind: Kind, shape: Any) -> jax.Array:
        found, stored = plan.matrix(kind), PUBLISHED[kind]
        words = hashed(shape.shape, *numbers[stored])
        if stored == "bf16":
            return words
        codes = persistent.code_words(stored, found.warp_cols)
        return with_scales(words, found.tile_words, codes, scales[stored])

    codes = persistent.code_words("mxfp4", plan.down.features)
    down = hashed(shapes.expert_down.shape, *numbers["mxfp4"])
    return Weights(
        embed=hashed(shapes.embed.shape, 0x807F807F, 0x3F803F80),
        gains=jnp.ones(shapes.gains.shape, jnp.float32).view(jnp.int32),
        sinks=persistent.zeros(shapes.sinks),
        rotary=rotary_tables(config, plan.capacity),
        matrices={kind: matrix(kind, shape) for kind, shape in shapes.matrices.items()},
        expert_down=with_scales(down, plan.down.tile_words, codes, scales["mxfp4"]),
        router=hashed(shapes.router.shape, 0x807F807F, 0x3C003C00),
        router_bias=jnp.zeros(shapes.router_bias.shape, jnp.float32),
    )


def _check(buffers: Buffers) -> None:
    """UserError, naming the row, if a wait has given up."""
    if reason := persistent.given_up(buffers.fault):
        raise UserError(f"the persistent kernel: {reason}")


class Slice:
    """A plan, its table, weights and buffers on the device."""

    def __init__(self, config: ModelConfig, tokens: int, context: int, weights: Weights | None) -> None:
        self.plan = StepPlan(target_of(config), PUBLISHED, tokens, context)
        self.table: Table = persistent.table_of(self.plan)
        self.weights = weights or random_weights(config, self.plan)
        self.rows = jnp.asarray(self.table.rows)
        self.buffers = persistent.zeros(persistent.buffer_shapes(self.plan))
        caches = tuple(hashed(held.shape, 0x807F807F, 0x3D003D00) for held in self.buffers.caches)
        self.buffers = dataclasses.replace(self.buffers, caches=caches)
        self.ids = jnp.asarray((1 + 7919 * np.arange(self.plan.columns)) % self.plan.target.vocab, jnp.int32)
        self.step = jnp.array([context - tokens, tokens, 0, self.table.rows.shape[1]], jnp.int32)
        self.run: Callable = jax.jit(partial(persistent.launch, self.plan), donate_argnums=4)

    def launch(self) -> None:
        self.buffers: Buffers = self.run(self.rows, self.step, self.ids, self.weights, self.buffers)

    def seconds(self, rounds: int, repeats: int) -> list[float]:
        """Of a round, launched one after the other."""
        found = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            for _ in range(rounds):
                self.launch()
            jax.block_until_ready(self.buffers)
            found.append((time.perf_counter() - started) / rounds)
            _check(self.buffers)
        return found[1:]

    def timeline(self) -> np.ndarray:
        """Nanoseconds [CTAs, rows, ROLES, STAMPS] of one round, from its start."""
        shape = persistent.times_shape(self.table.rows)
        for _ in range(2):  # the first compiles
            self.buffers = dataclasses.replace(self.buffers, times=persistent.zeros(shape))
            self.launch()
        found = np.asarray(self.buffers.times).view(np.uint32)
        self.buffers = dataclasses.replace(self.buffers, times=None)
        _check(self.buffers)
        return (found - found[:, 0, 0, 0].min()).astype(np.int64)

    def bytes(self) -> int:
        """That a round has to read: weights, of experts those that were chosen; keys and values."""
        whole = [held for kind, held in self.weights.matrices.items() if kind != Kind.EXPERT_GATE_UP]
        used = int((np.asarray(self.buffers.expert_counts) > 0).sum())
        experts = [self.weights.matrices[Kind.EXPERT_GATE_UP], self.weights.expert_down]
        caches = sum(
            held.nbytes * (self.plan.target.window / self.plan.attention(True).cache_rows if is_sliding else 1)
            for is_sliding, held in enumerate(self.buffers.caches)
        )
        dense = sum(held.nbytes for held in (*whole, self.weights.router))
        return int(dense + caches + sum(used * held.nbytes // held.shape[0] for held in experts))


def by_kind(slice_: Slice, timeline: np.ndarray) -> Record:
    """Microseconds of all rows of a kind: a row's are from the end of the one before to its own, of the last CTA.

    `begins` is when half of its CTAs have seen the signals that it waits for.
    """
    consume = timeline[:, :, ROLES.index("consume")] / 1e3
    has_share = slice_.table.rows[:, :, 0] > 0
    ready = np.where(has_share, consume[:, :, STAMPS.index("ready")], np.nan)
    ends = np.maximum.accumulate(consume[:, :, STAMPS.index("done")].max(axis=0))
    before = np.concatenate([[0], ends[:-1]])
    kinds, found = slice_.table.rows[:, :, 0].max(axis=0), {}
    for kind in np.unique(kinds):
        own = kinds == kind
        took, begins = (ends - before)[own], np.nanmedian(ready[:, own], axis=0) - before[own]
        found[Op(kind).name.lower()] = {
            "rows": len(took),
            "us": float(took.sum()),
            "us_each": float(np.median(took)),
            "begins": float(np.median(begins)),
        }
    return found


def need_hopper() -> None:
    """UserError, if the kernel does not run here."""
    if not on_hopper():
        kind = jax.devices()[0].device_kind
        raise UserError(f"the persistent kernel runs on Hopper GPUs (H100, H200); JAX's default device is {kind!r}")


def soak(rounds: int, seed: int = 0) -> Record:
    """One block of the bundled model again and again, over poisoned buffers: how many rounds gave other bits."""
    need_hopper()
    model = load(layout="persistent", draft="none")
    step: Any = model.decoder.step
    cache = step.init_cache(1, CAPACITY)
    weights = dataclasses.replace(model.params[PERSISTENT], rotary=cache.rotary)
    launch = launcher(step.plan(MOST_TOKENS, CAPACITY))
    ids = jnp.asarray(np.random.default_rng(seed).integers(0, model.config.vocab_size, MOST_TOKENS, np.int32))

    def once(row: Row) -> Row:
        nothing: Any = {name: jnp.full_like(getattr(row.buffers, name), jnp.nan) for name in POISONED}
        poisoned = dataclasses.replace(row, buffers=dataclasses.replace(row.buffers, **nothing))
        return launch(weights, ids, poisoned, jnp.int32(LENGTH), jnp.int32(MOST_TOKENS))

    @partial(jax.jit, donate_argnums=0)
    def several(row: Row, wanted: jax.Array) -> tuple[Row, jax.Array]:
        def body(_: Any, carry: tuple) -> tuple:
            row = once(carry[0])
            return row, carry[1] + jnp.any(row.buffers.logits.view(jnp.int32) != wanted)

        return jax.lax.fori_loop(0, AT_ONCE, body, (row, jnp.int32(0)))

    row, others = jax.jit(once, donate_argnums=0)(cache.rows[0]), 0
    wanted = jnp.copy(row.buffers.logits).view(jnp.int32)
    for _ in range(0, rounds, AT_ONCE):
        row, found = several(row, wanted)
        others += int(found)
        _check(row.buffers)
    finite = bool(jnp.isfinite(row.buffers.logits).all())
    return {"device": jax.devices()[0].device_kind, "rounds": rounds, "with_other_bits": others, "finite": finite}


def measure(
    name: str, ways: int, layers: int | None, tokens: list[int], contexts: list[int], rounds: int, repeats: int
) -> Iterator[Record]:
    """A record for each number of tokens and context; the first says what was measured on."""
    need_hopper()
    config = share(preset(name), ways, layers)
    if reason := StepPlan(target_of(config), PUBLISHED, max(tokens), max(contexts)).unsupported():
        raise UserError(f"the persistent kernel cannot serve this: {reason}")
    weights, reached = None, streaming_read(8 << 30, repeats)
    yield {"device": jax.devices()[0].device_kind, "layers": config.num_layers, "tp": ways, "streaming_read": reached}
    for context in contexts:
        for count in tokens:
            slice_ = Slice(config, count, context, weights)
            rotary = rotary_tables(config, context)
            slice_.weights = weights = dataclasses.replace(slice_.weights, rotary=rotary)
            found = slice_.seconds(rounds, repeats)
            median, read = statistics.median(found), slice_.bytes()
            yield {
                "tokens": count,
                "context": context,
                **{key: 1e3 * value for key, value in spread(found, "milliseconds").items()},
                "bytes": read,
                "of_datasheet": read / median / GPUS["h200"].bandwidth,
                "of_streaming_read": read / median / reached,
                "experts": int((np.asarray(slice_.buffers.expert_counts) > 0).sum()),
                "kinds": by_kind(slice_, slice_.timeline()),
            }
