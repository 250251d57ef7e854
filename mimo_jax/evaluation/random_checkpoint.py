"""A checkpoint of the published layout with random weights: larger than the bundled model, and nothing to download."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from mimo_jax.checkpoint.export import write_checkpoint
from mimo_jax.config.model import GLOBAL, SLIDING, ModelConfig
from mimo_jax.config.presets import preset
from mimo_jax.loading import BUNDLED
from mimo_jax.modeling.backbone import init_params
from mimo_jax.weights.params import is_moe

# 104.7 M parameters, of which a token uses 23.4 M (one row of the embedding counted). Heads are as wide as the
# published ones: other widths slow down libraries that are written for those.
SMALL = dataclasses.replace(
    preset("mimo-v2.5-pro"),
    vocab_size=8192,
    hidden_size=512,
    layer_pattern=(GLOBAL, SLIDING, SLIDING, SLIDING) * 2,
    moe_pattern=(0,) + (1,) * 7,
    num_heads=4,
    num_kv_heads=1,
    sliding_num_kv_heads=1,
    intermediate_size=1024,
    moe_intermediate_size=256,
    num_experts=32,
    experts_per_token=4,
    rope_theta=1e4,
    max_position=4096,
    mtp_layers=0,
    bos_token_id=0,
    eos_token_id=None,  # every text gets the length that was asked for
    pad_token_id=0,
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")  # the bundled model's; the other half of the rows has no text
ROUTER_BIAS = 60  # standard deviation, in units of the other weights'


def write_random(
    directory: Path,
    config: ModelConfig = SMALL,
    seed: int = 0,
    router_bias: float = ROUTER_BIAS,
    overwrite: bool = False,
) -> None:
    """Writes `config` with normal weights that `seed` decides.

    `router_bias` makes routing decisive, so that experts do not depend on how an implementation rounds. It also makes
    routing much alike for all tokens: a block of 8 reads 5 of 32 experts, with 0 about 10.
    """
    params = jax.tree.map(np.array, init_params(config, jax.random.key(seed)))
    generator = np.random.default_rng(seed)
    for layer in params.values():
        if isinstance(layer, dict) and is_moe(layer.get("moe")):
            shape = layer["moe"]["router_bias"].shape
            layer["moe"]["router_bias"] = generator.normal(0, router_bias * config.init_range, shape).astype(np.float32)
    files = {name: BUNDLED / name for name in TOKENIZER}
    write_checkpoint(directory, config, params, files, overwrite)
