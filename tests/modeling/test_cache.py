"""The cache's memory and its bookkeeping of positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.config.model import GLOBAL, SLIDING
from mimo_jax.modeling.cache import MAX_BLOCK, LayerCache, append, init_cache, row_positions
from tests.tiny import tiny_config


def test_sliding_layers_do_not_grow():
    """Only global layers take memory per token; a sliding layer holds its window and one block."""
    config = tiny_config(num_kv_heads=1, sliding_num_kv_heads=2)
    for capacity in (64, 4096):
        cache = init_cache(config, 3, capacity)
        for kind, layer in zip(config.layer_pattern, cache.layers):
            rows = capacity if kind == GLOBAL else config.sliding_window - 1 + MAX_BLOCK
            assert layer.keys.shape == (3, config.kv_heads(kind), rows, config.head_dim)
            assert layer.values.shape == (3, config.kv_heads(kind), rows, config.v_head_dim)
    assert cache.lengths.tolist() == [0, 0, 0]


def test_row_positions():
    """A row is read as the position it holds, or as a negative one when it holds none."""
    assert row_positions(GLOBAL, 5, jnp.array([3]))[0].tolist() == [0, 1, 2, -1, -1]
    ring = row_positions(SLIDING, 4, jnp.array([0, 3, 6]))
    assert (ring[0] < 0).all()
    assert ring[1].tolist()[:3] == [0, 1, 2] and ring[1, 3] < 0
    assert ring[2].tolist() == [4, 5, 2, 3]


jit_append = jax.jit(append, static_argnums=5)


def stamped(start: int, block: int) -> jnp.ndarray:
    """Keys whose value is their position."""
    return jnp.asarray(np.arange(start, start + block, dtype=np.float32)[None, :, None, None])


@settings(max_examples=60, deadline=None)
@given(
    window=st.sampled_from((1, 2, 9)),
    writes=st.lists(st.tuples(st.integers(1, MAX_BLOCK), st.integers(0, MAX_BLOCK)), max_size=8),
    kind=st.sampled_from((GLOBAL, SLIDING)),
)
def test_every_needed_position_is_held(window, writes, kind):
    """After any sequence of blocks written and partly taken back, the whole window is there under its own position."""
    rows = window - 1 + MAX_BLOCK if kind == SLIDING else 80
    layer = LayerCache(jnp.full((1, 1, rows, 1), -1.0), jnp.full((1, 1, rows, 1), -1.0))
    length = 0
    for block, kept in writes:
        keys = stamped(length, MAX_BLOCK)
        layer = jit_append(layer, keys, keys, jnp.array([length]), jnp.array([block]), kind)
        length += min(kept, block)
        held = np.asarray(row_positions(kind, rows, jnp.array([length])))[0].tolist()
        stored = np.asarray(layer.keys)[0, 0, :, 0]
        # The next query, at position `length`, sees window - 1 positions besides its own.
        for position in range(max(0, length - window + 1) if kind == SLIDING else 0, length):
            assert stored[held.index(position)] == position


@pytest.mark.parametrize("kind", [GLOBAL, SLIDING])
def test_padding_is_never_cached(kind):
    """Of a padded block only the real tokens are written, row by row; a ring keeps the last of a long one."""
    rows = 6
    layer = LayerCache(jnp.full((2, 1, rows, 1), -1.0), jnp.full((2, 1, rows, 1), -1.0))
    keys = jnp.tile(stamped(0, 9), (2, 1, 1, 1))
    layer = append(layer, keys, keys, jnp.zeros(2, jnp.int32), jnp.array([2, 6]), kind)
    assert layer.keys[0, 0, :, 0].tolist() == [0, 1, -1, -1, -1, -1]
    assert layer.values[1, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    if kind == SLIDING:
        layer = append(layer, keys, keys, jnp.zeros(2, jnp.int32), jnp.array([2, 9]), kind)
        assert layer.keys[1, 0, :, 0].tolist() == [6, 7, 8, 3, 4, 5]
