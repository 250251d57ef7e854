"""Experts in the Hopper kernel's tiles: the same model, on one device and on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from mimo_jax.errors import UserError
from mimo_jax.generation import generate_batch
from mimo_jax.model import Model
from mimo_jax.modeling.backbone import Backbone, init_params
from mimo_jax.sampling import Greedy
from mimo_jax.sharding import Layout, make_mesh, place, using
from mimo_jax.tiles import tile_params
from tests.tiny import tiny_config

# One layer of experts, as small as the kernel's tiles allow on two devices that share the features.
CONFIG = tiny_config(
    hidden_size=512,
    moe_intermediate_size=512,
    layer_pattern=(0, 1),
    moe_pattern=(0, 1),
    intermediate_size=512,
    num_kv_heads=4,
    sliding_num_kv_heads=4,
    mtp_layers=0,
    storage="mxfp4",
)
PARAMS = init_params(CONFIG, jax.random.key(0))
CONFIG = dataclasses.replace(CONFIG, expert_backend="mosaic_gpu")


def on_cpu(tiled):
    """The tiles with the backend that a CPU has."""
    config, params = tiled
    return dataclasses.replace(config, expert_backend="reference"), params


def logits_of(config, params, tokens, mesh=None) -> np.ndarray:
    @jax.jit
    def run(params):
        with using(mesh):
            return Backbone(config).apply({"params": params}, tokens)[0]

    return np.asarray(run(params))


class Text:
    """A tokenizer's stand-in."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_tiles_write_the_same_tokens():
    """Generated tokens do not depend on how the experts lie: prefill by groups, decoding one expert at a time."""
    models = [(dataclasses.replace(CONFIG, expert_backend=None), PARAMS), on_cpu(tile_params(CONFIG, PARAMS))]
    assert models[1][0].storage == "tiled"
    packed, tiled = (
        generate_batch(Model(*model, Text(), (), {}), [list(range(40, 70))], Greedy(), max_tokens=12)[0].tokens
        for model in models
    )
    assert packed == tiled and len(tiled) == 12


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; on CPU they are simulated")
@pytest.mark.parametrize(("layout", "tokens"), [(Layout(tensor=2), 4), (Layout(expert=2, tensor=2), 40)])
def test_tiles_on_a_mesh(layout, tokens):
    """Each device tiles and multiplies its own experts or features; together they are one device within 1e-5."""
    tokens = np.random.default_rng(0).integers(0, 256, (1, tokens))
    mesh = make_mesh(layout)
    placed = place(PARAMS, mesh)
    config, tiled = on_cpu(tile_params(CONFIG, placed, mesh, consume=True))
    assert placed["layers_1"]["moe"]["gate"].codes.is_deleted()
    for leaf in jax.tree.leaves(tiled["layers_1"]["moe"]["tiles"]):
        assert leaf.addressable_shards[0].data.size == leaf.size // layout.devices
    one = logits_of(dataclasses.replace(CONFIG, expert_backend=None), PARAMS, tokens)
    np.testing.assert_allclose(logits_of(config, tiled, tokens, mesh), one, atol=1e-5)


def test_the_kernel_is_refused_where_it_cannot_run():
    """A named backend is an error on a CPU, at sizes without tiles, and when nobody knows it; by default nothing is."""
    config, params = tile_params(CONFIG, PARAMS)
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu' cannot serve this call: .*'cpu'.*; reference"):
        logits_of(config, params, np.zeros((1, 3), np.int32))
    narrow = dataclasses.replace(CONFIG, moe_intermediate_size=96)
    with pytest.raises(UserError, match="512 x 96"):
        tile_params(narrow, PARAMS)
    with pytest.raises(UserError, match="'cutlass' is unknown"):
        tile_params(dataclasses.replace(CONFIG, expert_backend="cutlass"), PARAMS)
    for name in (None, "reference"):
        config = dataclasses.replace(CONFIG, expert_backend=name)
        assert tile_params(config, PARAMS) == (config, PARAMS)
