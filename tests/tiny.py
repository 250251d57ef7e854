"""A model small enough for every test: global and sliding, dense and routed layers, an MTP layer; and a drafter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.config.model import FileFormat, ModelConfig
from mimo_jax.layouts import packed
from mimo_jax.modeling.backbone import abstract_params, init_params
from mimo_jax.modeling.dflash import abstract_drafter
from mimo_jax.weights import encode
from mimo_jax.weights.params import path_names, weights

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    layer_pattern=(0, 1, 1, 0),
    moe_pattern=(0, 1, 1, 1),
    num_heads=4,
    num_kv_heads=2,
    sliding_num_kv_heads=2,
    head_dim=24,
    v_head_dim=16,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_experts=8,
    experts_per_token=2,
    rope_theta=1e4,
    sliding_rope_theta=100.0,
    sliding_window=8,
    value_scale=0.612,
    max_position=256,
    mtp_layers=1,
    dtype="float32",
    init_range=0.08,
)

TINY_DRAFTER = DrafterConfig(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    target_layer_ids=(0, 1),
    num_target_layers=2,
    vocab_size=256,
    mask_token_id=5,
    window=16,
    dtype="float32",
)


# How far logits of scale 5 are from those of float32 in another order. Where pairs of bf16 are multiplied, inputs of
# products keep 16 bits of their 24: 9e-5 measured.
NATIVE_TOLERANCE = {"avx512_bf16": 2e-4, "avx512": 2e-5, "avx2": 2e-5, "neon": 2e-5}


def tiny_config(**changes) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def tiny_drafter(**changes) -> DrafterConfig:
    return dataclasses.replace(TINY_DRAFTER, **changes)


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Random plain parameters whose sinks, router biases and gains are off their neutral start."""
    return _random(abstract_params(config), config.init_range, seed)


def random_drafter_params(config: DrafterConfig, seed: int = 0) -> dict:
    """The same for a drafter."""
    return _random(abstract_drafter(config), config.init_range, seed)


def _random(abstract: dict, init_range: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    scales = {"sink": (0, 1.0), "router_bias": (0, 0.2), "weight": (1, 0.2)}

    def draw(path, leaf):
        mean, scale = scales.get(getattr(path[-1], "key", ""), (0, init_range))
        return jnp.asarray(rng.normal(mean, scale, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)).astype(np.int32)


def in_format(config: ModelConfig, params: dict, name: str, dtype: str = "float32") -> dict:
    """Plain parameters as files of a format hold them."""
    table = weights(config, FileFormat(name, dtype))
    leaves = {
        weight.path: encode(weight.of(params), weight.stored, dtype)
        for weight in table
        if weight.row.kind not in ("router", "float32")
    }

    def stored(path, leaf):
        return leaves.get(tuple(path_names(path)), leaf)

    return jax.tree_util.tree_map_with_path(stored, params)


def init_in_format(config: ModelConfig, name: str, seed: int = 0) -> dict:
    """Random parameters ready to run: of a file format, in the packed layout."""
    make = jax.jit(lambda key: in_format(config, init_params(config, key), name))
    return packed.pack(config, make(jax.random.key(seed)))[1]
