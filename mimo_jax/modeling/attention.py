"""Grouped-query attention of both kinds: global, and sliding with a learned sink logit per head."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mimo_jax.config.model import GLOBAL, MESH_BLOCK, SLIDING, ModelConfig
from mimo_jax.modeling.cache import CACHE_AXES, LayerCache, append, row_positions
from mimo_jax.modeling.layers import rotate
from mimo_jax.modeling.linear import linear, matrix, parameter
from mimo_jax.sharding import current_mesh, spec_of
from pallas_kernels.attention import CHUNK, attend_long, scores


def attend(
    q_BTHQ: Float[Array, "B T H Q"],
    k_BKSQ: Float[Array, "B K S Q"],
    v_BKSV: Float[Array, "B K S V"],
    visible_BTS: Bool[Array, "B T S"],
    sink_H: Float[Array, "H"] | None,
) -> Float[Array, "B T H V"]:
    """Softmax attention in float32; the sink joins the denominator as one more logit that has no value vector."""
    batch, steps, heads = q_BTHQ.shape[:3]
    kv_heads = k_BKSQ.shape[1]
    s_BKGTS = scores(q_BTHQ, k_BKSQ, visible_BTS)
    top = jnp.max(s_BKGTS, axis=-1, keepdims=True)
    sink_KG = None
    if sink_H is not None:
        sink_KG = sink_H.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, 1, 1)
        top = jnp.maximum(top, sink_KG)
    top = jax.lax.stop_gradient(top)
    e_BKGTS = jnp.exp(s_BKGTS - top)
    total = jnp.sum(e_BKGTS, axis=-1, keepdims=True)
    if sink_KG is not None:
        total = total + jnp.exp(sink_KG - top)
    p_BKGTS = (e_BKGTS / total).astype(v_BKSV.dtype)
    return jnp.einsum("bkgts,bksv->btkgv", p_BKGTS, v_BKSV).reshape(batch, steps, heads, -1)


def attend_rows(
    q_BTHQ: Float[Array, "B T H Q"],
    layer: LayerCache,
    query_BT: Int[Array, "B T"],
    sink_H: Float[Array, "H"] | None,
) -> Float[Array, "B T H V"]:
    """What `attend` gives for a cache whose rows are positions; those after the last query are not read."""
    if current_mesh() is None:
        return attend_long(q_BTHQ, layer.keys, layer.values, query_BT, sink_H)
    # By hand: the compiler cannot split a kernel by heads.
    queries, rows, heads = spec_of(("batch", None, "heads", None)), spec_of(CACHE_AXES), spec_of(("heads",))
    in_specs = (queries, rows, rows, spec_of(("batch", None)), None if sink_H is None else heads)
    per_device = jax.shard_map(attend_long, in_specs=in_specs, out_specs=queries, check_vma=False)
    return per_device(q_BTHQ, layer.keys, layer.values, query_BT, sink_H)


def heads_first(x_BTKQ: Float[Array, "B T K Q"]) -> Float[Array, "B K T Q"]:
    """The layout that `attend` and the cache share: a batched matmul reads it without a copy."""
    return jnp.swapaxes(x_BTKQ, 1, 2)


def visibility(query_BT: Int[Array, "B T"], key_BS: Int[Array, "B S"], window: int | None) -> Bool[Array, "B T S"]:
    """Which key positions a query position sees: its own and earlier ones, the last `window` of them if given."""
    distance_BTS = query_BT[:, :, None] - key_BS[:, None, :]
    visible_BTS = (distance_BTS >= 0) & (key_BS >= 0)[:, None, :]
    return visible_BTS if window is None else visible_BTS & (distance_BTS < window)


def attend_banded(q_BTHQ: Array, k_BTKQ: Array, v_BTKV: Array, window: int, sink_H: Array | None) -> Array:
    """Sliding attention over a whole sequence at the cost of two windows of keys per query.

    The sequence is split into blocks as long as the window; a block sees itself and the block before it.
    """
    batch, steps = q_BTHQ.shape[:2]
    blocks = -(-steps // window)

    def in_blocks(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, blocks * window - steps), (0, 0), (0, 0)])
        return padded.reshape(batch, blocks, window, *x.shape[2:])

    def with_previous(x: Array) -> Array:
        previous = jnp.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])
        both = jnp.concatenate([previous, x], axis=2).reshape(batch * blocks, 2 * window, *x.shape[3:])
        return heads_first(both)

    query = jnp.arange(blocks * window).reshape(blocks, window)
    key = jnp.concatenate([query - window, query], axis=1)  # negative in the first block: nothing there
    visible = jnp.tile(visibility(query, key, window), (batch, 1, 1))
    q = in_blocks(q_BTHQ).reshape(batch * blocks, window, *q_BTHQ.shape[2:])
    out = attend(q, with_previous(in_blocks(k_BTKQ)), with_previous(in_blocks(v_BTKV)), visible, sink_H)
    return out.reshape(batch, blocks * window, *out.shape[2:])[:, :steps]


class Attention(nn.Module):
    """Projects, rotates, attends. Fused QKV rows are stored in chunks [Q heads, K heads, V heads] per chunk."""

    config: ModelConfig
    kind: int

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotary: tuple[Array, Array],
        cache: LayerCache | None = None,
        lengths_B: Int[Array, "B"] | None = None,
        counts_B: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Without a cache, attends over the T tokens themselves; with one, after its `lengths_B` tokens."""
        config = self.config
        window = config.sliding_window if self.kind == SLIDING else None
        q, k, v = self._project(x_BTD)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        v = (v.astype(jnp.float32) * config.value_scale).astype(v.dtype)
        sink_H = None
        if config.has_sink(self.kind):
            sink_H = parameter(self, "sink", (config.num_heads,), nn.initializers.zeros)
        if cache is not None:
            out_BTHV, cache = self._attend_cached(q, k, v, sink_H, window, cache, lengths_B, counts_B)
        elif window is not None and x_BTD.shape[1] > 2 * window:
            out_BTHV = attend_banded(q, k, v, window, sink_H)
        else:
            position = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
            out_BTHV = attend(q, heads_first(k), heads_first(v), visibility(position, position, window), sink_H)
        shape = (config.hidden_size, config.num_heads * config.v_head_dim)
        o = matrix(self, "o", shape, config.init_range)
        return linear(out_BTHV.reshape(*x_BTD.shape[:2], -1), o), cache

    def _attend_cached(self, q, k, v, sink_H, window, cache, lengths_B, counts_B):
        query_BT = lengths_B[:, None] + jnp.arange(q.shape[1])
        updated = append(cache, k, v, lengths_B, counts_B, self.kind)
        if self.kind == GLOBAL and updated.keys.shape[2] > CHUNK:
            return attend_rows(q, updated, query_BT, sink_H), updated
        if self.kind == SLIDING and (q.shape[1] > MESH_BLOCK or current_mesh() is None):
            # The ring as it was, then the new tokens: a long chunk overwrites rows its first queries still need, and a
            # CPU need not wait for the update.
            keys = jnp.concatenate([cache.keys, heads_first(k)], axis=2)
            values = jnp.concatenate([cache.values, heads_first(v)], axis=2)
            held_BS = row_positions(self.kind, cache.keys.shape[2], lengths_B)
            key_BS = jnp.concatenate([held_BS, query_BT], axis=1)
        else:
            # In the order of the cache's rows, which is the same for a token that is read alone or in a block: on
            # a mesh its logits do not depend on that (`decode.step`).
            keys, values = updated.keys, updated.values
            key_BS = row_positions(self.kind, keys.shape[2], lengths_B + counts_B)
        return attend(q, keys, values, visibility(query_BT, key_BS, window), sink_H), updated

    def _project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        config = self.config
        heads, kv_heads = config.num_heads, config.kv_heads(self.kind)
        sizes = (heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.v_head_dim)
        if config.fused_qkv:
            chunks = config.qkv_chunks
            rows = [size // chunks for size in sizes]
            qkv = matrix(self, "qkv", (chunks, sum(rows), config.hidden_size), config.init_range)
            q, k, v = jnp.split(linear(x_BTD, qkv), (rows[0], rows[0] + rows[1]), axis=-1)
        else:
            q, k, v = (
                linear(x_BTD, matrix(self, name, (size, config.hidden_size), config.init_range))
                for name, size in zip("qkv", sizes)
            )
        lead = x_BTD.shape[:2]
        return (
            q.reshape(*lead, heads, config.head_dim),
            k.reshape(*lead, kv_heads, config.head_dim),
            v.reshape(*lead, kv_heads, config.v_head_dim),
        )
