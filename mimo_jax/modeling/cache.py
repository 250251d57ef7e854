"""The KV cache: rows that grow on global layers, a ring on sliding layers, which takes no memory per token.

A ring of R rows keeps position p in row p mod R. With R >= window - 1 + N, a block of N tokens may be written and then
partly taken back (by shortening `lengths`): what it overwrote had already left every window that is still needed, and
the rows it leaves behind are read as positions too old to be visible.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.config.model import GLOBAL, MAX_BLOCK, SLIDING, ModelConfig

CACHE_AXES: Any = ("batch", "heads", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Rotated keys and scaled values of one layer; S is the capacity (global) or the ring size (sliding)."""

    keys: Float[Array, "B K S Q"]
    values: Float[Array, "B K S V"]

    def axes(self) -> LayerCache:
        """Devices share the heads."""
        return LayerCache(CACHE_AXES, CACHE_AXES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One `LayerCache` per layer and the number of committed tokens of each row."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """So many tokens a row may have."""
        return max(layer.keys.shape[2] for layer in self.layers)


def init_layer(config: ModelConfig, kind: int, batch: int, capacity: int) -> LayerCache:
    """The empty rows of one layer."""
    rows = capacity if kind == GLOBAL else min(capacity, config.sliding_window - 1 + MAX_BLOCK)
    shape, dtype = (batch, config.kv_heads(kind), rows), jnp.dtype(config.dtype)
    return LayerCache(jnp.zeros((*shape, config.head_dim), dtype), jnp.zeros((*shape, config.v_head_dim), dtype))


def init_cache(config: ModelConfig, batch: int, capacity: int) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` tokens."""
    layers = tuple(init_layer(config, kind, batch, capacity) for kind in config.layer_pattern)
    return Cache(layers, jnp.zeros(batch, jnp.int32))


def row_positions(kind: int, rows: int, lengths_B: Int[Array, "B"]) -> Int[Array, "B S"]:
    """The position each row holds when `lengths_B` tokens are committed; negative where it holds none."""
    row_S = jnp.arange(rows)
    last_B1 = lengths_B[:, None] - 1
    if kind == SLIDING:
        return last_B1 - (last_B1 - row_S) % rows
    return jnp.where(row_S <= last_B1, row_S, -1)


def append(
    layer: LayerCache,
    keys_BTKQ: Float[Array, "B T K Q"],
    values_BTKV: Float[Array, "B T K V"],
    lengths_B: Int[Array, "B"],
    counts_B: Int[Array, "B"],
    kind: int,
) -> LayerCache:
    """Writes the first `counts_B` of T new tokens after `lengths_B`; of more than a ring holds, only the last."""
    batch, block = keys_BTKQ.shape[:2]
    rows = layer.keys.shape[2]
    step_T = jnp.arange(block)
    position_BT = lengths_B[:, None] + step_T
    row_BT = position_BT % rows if kind == SLIDING else position_BT
    written_BT = (step_T < counts_B[:, None]) & (step_T >= counts_B[:, None] - rows)
    row_BT = jnp.where(written_BT, row_BT, rows)  # out of range, so dropped
    index = (jnp.arange(batch)[:, None], slice(None), row_BT)
    return LayerCache(
        layer.keys.at[index].set(keys_BTKQ, mode="drop", unique_indices=False),
        layer.values.at[index].set(values_BTKV, mode="drop", unique_indices=False),
    )
