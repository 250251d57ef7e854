"""One device's share of a model that needs several, as a model of its own: what a round takes there, without transfers.

The share of a tensor-parallel device is a model with that part of the heads, features and rows of the vocabulary; all
experts are there, each cut. Weights are random, in the storage of the real ones.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax import decoding
from mimo_jax.cache import init_cache
from mimo_jax.checkpoint.orbax import abstract_tree
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.drafting import Draft, NoDrafter, Proposer
from mimo_jax.modeling.drafter import abstract_drafter
from mimo_jax.sampling import Greedy
from mimo_jax.sharding import Layout
from pallas_kernels.timing import seconds

SCALE = 119  # E8M0: 2^-8, so that sums of thousands of products stay near 1


@dataclasses.dataclass(frozen=True)
class BlankDrafter(NoDrafter):
    """Drafts nothing of value and takes no time: a round is what verifying a block takes."""

    block_size: int = 8

    def propose(self, params, target, cache, last_B, lengths_B, strategy, keys_B) -> Draft:
        # Ids that differ, so that they are routed differently.
        slots_M = jnp.arange(1, self.block_size)
        return Draft((last_B[:, None] * 31 + 7919 * slots_M) % target["embed"].shape[0], None)


def share(config: ModelConfig, ways: int, layers: int | None) -> ModelConfig:
    """The share of one of `ways` tensor-parallel devices, of the first `layers` layers."""
    Layout(tensor=ways).check_divides(config)
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size // ways,
        layer_pattern=config.layer_pattern[:layers],
        moe_pattern=config.moe_pattern[:layers],
        num_heads=config.num_heads // ways,
        num_kv_heads=config.num_kv_heads // ways,
        sliding_num_kv_heads=config.sliding_num_kv_heads // ways,
        intermediate_size=config.intermediate_size // ways,
        moe_intermediate_size=config.moe_intermediate_size // ways,
        mtp_layers=0,
        bos_token_id=None,  # special ids may lie in another share
        eos_token_id=None,
        pad_token_id=None,
    )


def drafter_share(config: DrafterConfig, ways: int, layers: int) -> DrafterConfig:
    """The drafter's share, which taps as many of `layers` layers as the whole one taps of all."""
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size // ways,
        mask_token_id=0,
        num_heads=config.num_heads // ways,
        num_kv_heads=config.num_kv_heads // ways,
        intermediate_size=config.intermediate_size // ways,
        num_target_layers=layers,
        target_layer_ids=tuple(min(layer, layers - 1) for layer in config.target_layer_ids),
    )


def random_weights(config: ModelConfig) -> Any:
    """Packed weights of random content, made on the device leaf by leaf."""
    return _random_tree(abstract_tree(config))


def random_drafter(config: DrafterConfig) -> Any:
    return _random_tree(abstract_drafter(config))


def _random_tree(tree: Any) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = []
    for key, (path, leaf) in zip(keys, leaves):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        make = jax.jit(_random_leaf, static_argnums=(1, 2, 3))
        made.append(make(key, name.endswith("scales"), leaf.shape, leaf.dtype))
    return jax.tree.unflatten(structure, made)


def _random_leaf(key: jax.Array, is_scale: bool, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if dtype == jnp.uint8:
        return jnp.full(shape, SCALE, jnp.uint8) if is_scale else jax.random.bits(key, shape, jnp.uint8)
    if is_scale:
        return jnp.full(shape, 2.0**-8, dtype)
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def seconds_per_round(
    config: ModelConfig, weights: decoding.Weights, drafter: Proposer, context: int, rounds: int, repeats: int
) -> list[float]:
    """Seconds a round takes behind `context` cached tokens: of each of `repeats` runs of `rounds`, compiled before."""
    engine = decoding.Engine(decoding.FlaxStep(config, drafter.taps), drafter)
    capacity = context + (rounds + 2) * drafter.block_size * (repeats + 1)
    cache = init_cache(config, 1, capacity)
    cache = dataclasses.replace(cache, lengths=jnp.full(1, context, jnp.int32))
    draft_cache = drafter.init_cache(1, capacity)
    logits, stops = jnp.zeros((1, config.vocab_size)), decoding.as_stops(())
    limits, keys = np.full(1, capacity, np.int32), decoding.row_keys([0])
    state = decoding.start(engine, cache, draft_cache, logits, limits, keys, stops, Greedy())
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        state = decoding.decode(engine, weights, state, stops, Greedy(), np.int32(rounds))
        jax.block_until_ready(state)
        found.append((time.perf_counter() - started) / rounds)
    return found[1:]


def streaming_read(nbytes: int, repeats: int) -> float:
    """Bytes per second of a sum over an array of `nbytes`, the median of `repeats`: what reading alone reaches."""
    data = jnp.ones((nbytes // 4 // 1024, 1024), jnp.float32)
    total = jax.jit(lambda array: jnp.sum(array, axis=0))
    return data.nbytes / statistics.median(seconds(total, data, repeats=repeats))
