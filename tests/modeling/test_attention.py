"""Attention: the band equals the mask, and a direct restatement of the published equations equals the module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config.model import GLOBAL, SLIDING
from mimo_jax.modeling.attention import Attention, attend, attend_banded, attend_rows, heads_first, visibility
from mimo_jax.modeling.cache import LayerCache
from mimo_jax.modeling.layers import rotary_table
from mimo_jax.sharding import MeshShape, make_mesh, place, using
from tests.tiny import random_params, tiny_config


def random(shape: tuple[int, ...], seed: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("length", [17, 24, 31, 32, 33])
@pytest.mark.parametrize("with_sink", [False, True])
def test_band_equals_mask(length, with_sink):
    """Long sequences use two windows of keys per query instead of a full mask, with the same result."""
    window, heads = 8, 4
    q, k, v = random((2, length, heads, 12), 0), random((2, length, 2, 12), 1), random((2, length, 2, 8), 2)
    sink = random((heads,), 3) if with_sink else None
    position = jnp.broadcast_to(jnp.arange(length), (2, length))
    dense = jax.jit(attend)(q, heads_first(k), heads_first(v), visibility(position, position, window), sink)
    # float32 sums of at most 8 terms in another order.
    banded = jax.jit(attend_banded, static_argnums=3)
    np.testing.assert_allclose(banded(q, k, v, window, sink), dense, atol=1e-6)


@pytest.mark.parametrize("with_sink", [False, True])
def test_a_mesh_cuts_a_long_cache_by_heads(with_sink):
    """Rows that are positions, as `attend` sees them, on one device and with batch and heads distributed over eight."""
    heads, rows, steps = 8, 20, 3
    q, layer = random((2, steps, heads, 12), 0), LayerCache(random((2, 4, rows, 12), 1), random((2, 4, rows, 8), 2))
    sink = random((heads,), 3) if with_sink else None
    query = jnp.array([[4], [17]]) + jnp.arange(steps)
    visible = visibility(query, jnp.broadcast_to(jnp.arange(rows), (2, rows)), None)
    dense = jax.jit(attend)(q, layer.keys, layer.values, visible, sink)
    for mesh in (None, make_mesh(MeshShape(data=2, tensor=4))):

        def run(q, layer, query, sink, mesh=mesh):
            with using(mesh):
                return attend_rows(q, layer, query, sink)

        found = jax.jit(run)(q, place(layer, mesh), query, sink)
        np.testing.assert_allclose(found, dense, atol=1e-6)


@pytest.mark.parametrize("window", [1, 4, None])
def test_visible_keys(window):
    """A query sees itself and what came before, the last `window` keys of it; empty cache rows are never seen."""
    query, key = jnp.array([[5, 6]]), jnp.array([[-3, 0, 2, 3, 4, 5, 6, 7]])
    seen = visibility(query, key, window)[0]
    for row, position in enumerate((5, 6)):
        oldest = 0 if window is None else position - window + 1
        assert seen[row].tolist() == [oldest <= k <= position and k >= 0 for k in key[0].tolist()]


def restated(params: dict, x: np.ndarray, config, kind: int) -> np.ndarray:
    """One head at a time, one query at a time, from the published formulas, in float64."""
    chunks, group = config.qkv_chunks, config.num_heads // config.kv_heads(kind)
    heads, kv_heads, dim, v_dim = config.num_heads, config.kv_heads(kind), config.head_dim, config.v_head_dim
    qkv = np.asarray(params["qkv"], np.float64)
    q_rows, k_rows = heads // chunks * dim, kv_heads // chunks * dim
    parts = qkv[:, :q_rows], qkv[:, q_rows : q_rows + k_rows], qkv[:, q_rows + k_rows :]
    q, k, v = (np.einsum("td,gmd->tgm", x, part) for part in parts)
    steps = len(x)
    q, k, v = q.reshape(steps, heads, dim), k.reshape(steps, kv_heads, dim), v.reshape(steps, kv_heads, v_dim)
    half = config.rotary_dim // 2
    angle = np.arange(steps)[:, None] * config.theta(kind) ** (-2 * np.arange(half) / config.rotary_dim)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rope(a):
        u, w, rest = a[..., :half], a[..., half : 2 * half], a[..., 2 * half :]
        return np.concatenate([u * cos - w * sin, w * cos + u * sin, rest], axis=-1)

    q, k, v = rope(q), rope(k), v * config.value_scale
    out = np.zeros((steps, heads, v_dim))
    for head in range(heads):
        for i in range(steps):
            first = max(0, i - config.sliding_window + 1) if kind == SLIDING else 0
            weight = np.exp(k[first : i + 1, head // group] @ q[i, head] / np.sqrt(dim))
            total = weight.sum() + (np.exp(float(params["sink"][head])) if kind == SLIDING else 0)
            out[i, head] = weight / total @ v[first : i + 1, head // group]
    return out.reshape(steps, -1) @ np.asarray(params["o"], np.float64).T


@pytest.mark.parametrize("kind, layer", [(GLOBAL, "layers_0"), (SLIDING, "layers_1")])
def test_matches_a_restatement_of_the_equations(kind, layer):
    """Fused chunks, rotary, grouped heads, scaled values and sinks are where the published equations put them."""
    config = tiny_config(num_kv_heads=2, sliding_num_kv_heads=4, mtp_layers=0)
    params = random_params(config)[layer]["attention"]
    x = np.random.default_rng(5).standard_normal((21, config.hidden_size))
    position = jnp.arange(21)[None]
    rotary = rotary_table(position, config.rotary_dim, config.theta(kind), jnp.float32)
    out, _ = jax.jit(Attention(config, kind).apply)({"params": params}, jnp.asarray(x[None], jnp.float32), rotary)
    # float32 against float64: values of scale 1, sums of 64 terms.
    np.testing.assert_allclose(out[0], restated(params, x, config, kind), atol=1e-5)
