"""The full-size tree, made without allocating anything, has exactly the published element counts."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp

from mimo_jax.config.model import PUBLISHED
from mimo_jax.config.presets import preset
from mimo_jax.modeling.backbone import abstract_params
from mimo_jax.weights.params import abstract_tree, weights


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_pro_has_one_trillion_parameters():
    """1.0212T parameters without the MTP layers, which hold 644.9M each."""
    params = abstract_params(preset("mimo-v2.5-pro"))
    mtp = {name: params.pop(name) for name in list(params) if name.startswith("mtp_")}
    assert len(mtp) == 3
    assert {count(layer) for layer in mtp.values()} == {644_905_088}
    assert count(params) == 1_021_248_126_336
    assert count(params["layers_1"]["attention"]) - 128 == 267_386_880  # without the sinks


def test_pro_in_the_fp4_layout_has_the_published_elements_by_dtype():
    """MTP layers included, the FP4 checkpoint's elements per dtype are reproduced to the last digit."""
    params = abstract_tree(weights(preset("mimo-v2.5-pro"), PUBLISHED))
    found = collections.Counter()
    for leaf in jax.tree.leaves(params):
        found[jnp.dtype(leaf.dtype).name] += math.prod(leaf.shape)
    assert found == {
        "uint8": 531_351_207_936,
        "float8_e4m3fn": 13_378_781_184,
        "float32": 163_648_512,
        "bfloat16": 9_450_733_440,
    }
    assert found.total() == 554_344_371_072


def test_flash_and_v25_have_309_billion():
    """MiMo-V2.5 and V2-Flash count 309 to 310 billion parameters, however the projections are stored."""
    for name in ("mimo-v2.5", "mimo-v2-flash"):
        config = dataclasses.replace(preset(name), mtp_layers=0)
        assert 308.5e9 < count(abstract_params(config)) < 310.5e9
