"""A step that is one launch of the persistent kernel of Hopper for up to eight tokens of a row.

Rows of a batch follow one another, and so do longer pieces of a prompt: the kernel is made for one text at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.config.model import ModelConfig
from mimo_jax.decode.sampling import Search, least_kept
from mimo_jax.decode.step import Shown
from mimo_jax.errors import UserError
from mimo_jax.layouts.persistent import PERSISTENT, formats_in, plan_of, rotary_tables
from mimo_jax.modeling.backbone import MEDIA, Features
from mimo_jax.sharding import embedding_lookup
from mimo_jax.weights import Params
from pallas_kernels import persistent
from pallas_kernels.persistent import MOST_TOKENS, Buffers, Kind, StepPlan, Weights

EMBEDDED = -1  # the auxiliary layer whose hidden states are the embeddings
KERNELS = (1, MOST_TOKENS)  # tokens that there is a kernel for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Row:
    """One text: what the kernel writes, and for each kernel its counters."""

    buffers: Buffers  # but counters
    counts: dict[int, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PersistentCache:
    rows: tuple[Row, ...]
    rotary: tuple[Array, Array]  # of global and of sliding layers
    lengths: Int[Array, "B"]
    capacity: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class PersistentStep:
    """A whole round in one launch. It takes parameters of the layout "persistent"."""

    config: ModelConfig
    formats: tuple[tuple[Kind, str], ...]  # that its parameters are stored in, see `formats_in`
    aux_layers: tuple[int, ...] = ()
    mesh: None = None
    prefill_buckets: tuple[int, ...] = (MOST_TOKENS, 8 * MOST_TOKENS)
    groups_freely: bool = False  # as far as hardware has shown
    search: Search = least_kept

    def init_cache(self, batch: int, capacity: int) -> PersistentCache:
        plans = {tokens: self.plan(tokens, capacity) for tokens in KERNELS}
        rows = tuple(_empty_row(plans) for _ in range(batch))
        tables = rotary_tables(self.config, capacity)
        return PersistentCache(rows, tables, jnp.zeros(batch, jnp.int32), capacity)

    def __call__(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        cache: PersistentCache,
        counts_B: Int[Array, "B"],
        logits: Shown = "all",
    ) -> tuple[Float[Array, "B _ C"], Features, PersistentCache]:
        """See `Step`. UserError where more tokens are asked for than can be taken back."""
        if logits == "all" and tokens_BT.shape[1] > MOST_TOKENS:  # a sliding layer's ring has overwritten older keys
            raise UserError(f"the persistent step verifies at most {MOST_TOKENS} tokens, not {tokens_BT.shape[1]}")
        if MEDIA in params:
            raise UserError("the persistent step reads no images, video or audio; load the model with layout='dense'")
        weights = dataclasses.replace(params[PERSISTENT], rotary=cache.rotary)
        tokens = min(size for size in KERNELS if size >= min(tokens_BT.shape[1], MOST_TOKENS))
        launch = launcher(self.plan(tokens, cache.capacity))
        arguments = zip(tokens_BT, cache.rows, cache.lengths, counts_B)
        found, rows = zip(*(self._read(launch, weights, *each) for each in arguments))
        *parts, experts = zip(*found)
        logits_BTC, hidden_BTD, aux_BTZ, best_BT = map(jnp.stack, parts)
        experts = functools.reduce(jnp.add, experts)
        features = Features(hidden_BTD, experts, self._with_embeddings(params["embed"], tokens_BT, aux_BTZ), best_BT)
        if logits == "last":
            last_B1 = jnp.maximum(counts_B - 1, 0)[:, None]
            logits_BTC = jnp.take_along_axis(logits_BTC, last_B1[..., None], axis=1)
            features = dataclasses.replace(features, best=jnp.take_along_axis(best_BT, last_B1, axis=1))
        return logits_BTC, features, dataclasses.replace(cache, rows=rows, lengths=cache.lengths + counts_B)

    def plan(self, tokens: int, capacity: int) -> StepPlan:
        """Of the kernel for so many tokens."""
        layers = tuple(layer for layer in self.aux_layers if layer != EMBEDDED)
        return plan_of(self.config, dict(self.formats), tokens, capacity, layers)

    def _read(self, launch: Any, weights: Weights, tokens_T, row: Row, length: Array, count: Array) -> tuple:
        """Logits, hidden and auxiliary states and the best of all tokens, tokens of each expert; and the row."""
        steps, found = tokens_T.shape[0], []
        padded = jnp.pad(tokens_T, (0, -steps % MOST_TOKENS))
        for first in range(0, steps, MOST_TOKENS):
            own = jnp.clip(count - first, 0, min(steps, MOST_TOKENS))
            row = launch(weights, padded[first : first + MOST_TOKENS], row, length + first, own)
            found.append(self._shown(row.buffers))
        *parts, experts = zip(*found)
        return (*(jnp.concatenate(part)[:steps] for part in parts), functools.reduce(jnp.add, experts)), row

    def _shown(self, buffers: Buffers) -> tuple[Array, ...]:
        dtype, width = jnp.dtype(self.config.dtype), self.config.hidden_size
        logits, hidden = (held.reshape(MOST_TOKENS, -1) for held in (buffers.logits, buffers.last))
        asked = sum(layer != EMBEDDED for layer in self.aux_layers)
        aux = buffers.aux[: MOST_TOKENS * asked * width].reshape(MOST_TOKENS, asked * width)
        experts = buffers.expert_counts.reshape(-1, self.config.num_experts)
        return logits, hidden.astype(dtype), aux.astype(dtype), buffers.best, experts

    def _with_embeddings(self, embed_CD: Array, tokens_BT: Array, aux_BTZ: Array) -> Array:
        """The auxiliary states in the order they were asked for: the kernel knows those of layers."""
        asked = sum(layer != EMBEDDED for layer in self.aux_layers)
        of_layers = iter(jnp.split(aux_BTZ, asked, axis=-1) if asked else ())
        embedded = embedding_lookup(embed_CD, tokens_BT).astype(aux_BTZ.dtype)
        parts = [embedded if layer == EMBEDDED else next(of_layers) for layer in self.aux_layers]
        return jnp.concatenate(parts, axis=-1) if parts else aux_BTZ


def step_of(config: ModelConfig, params: Params, aux_layers: tuple[int, ...] = ()) -> PersistentStep:
    """The step for parameters of the layout."""
    return PersistentStep(config, formats_in(config, params), aux_layers)


def _empty_row(plans: dict[int, StepPlan]) -> Row:
    """Buffers for whichever kernel needs more."""
    shapes = {tokens: persistent.buffer_shapes(plan) for tokens, plan in plans.items()}
    largest = jax.tree.map(lambda *held: max(held, key=lambda one: np.prod(one.shape)), *shapes.values())
    counts = persistent.zeros({tokens: held.counts for tokens, held in shapes.items()})
    return Row(dataclasses.replace(persistent.zeros(largest), counts=None), counts)


def launcher(plan: StepPlan) -> Any:
    """`launch(weights, tokens, row, length, count) -> row`, which is compiled once for all its calls."""
    table = persistent.table_of(plan).rows

    @jax.jit
    def launch(weights: Weights, tokens: Array, row: Row, length: Array, count: Array) -> Row:
        step = jnp.stack([length, count, jnp.int32(0), jnp.int32(table.shape[1])])
        buffers = dataclasses.replace(row.buffers, counts=row.counts[plan.tokens])
        buffers = persistent.launch(plan, jnp.asarray(table), step, tokens, weights, buffers)
        return Row(dataclasses.replace(buffers, counts=None), row.counts | {plan.tokens: buffers.counts})

    return launch
