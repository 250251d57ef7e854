"""Experts in the Hopper kernel's layout: the same model, on one device and on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from mimo_jax import layouts
from mimo_jax.decode.sampling import Greedy
from mimo_jax.errors import UserError
from mimo_jax.generation import generate_batch
from mimo_jax.loading import Model
from mimo_jax.modeling.backbone import Backbone, init_params
from mimo_jax.sharding import MeshShape, make_mesh, place, using
from tests.tiny import in_format, tiny_config

# One layer of experts, as small as the kernel's layout allows on two devices that share the features.
CONFIG = tiny_config(
    hidden_size=512,
    moe_intermediate_size=512,
    layer_pattern=(0, 1),
    moe_pattern=(0, 1),
    intermediate_size=512,
    num_kv_heads=4,
    sliding_num_kv_heads=4,
    mtp_layers=0,
)
PARAMS = in_format(CONFIG, init_params(CONFIG, jax.random.key(0)), "mxfp4")


def laid_out(layout: str, params=PARAMS, mesh=None, config=CONFIG, backend: str | None = "reference", **options):
    """Parameters in a layout, multiplied by the backend that a CPU has."""
    return layouts.for_device(config, params, mesh, layout, backend, **options)[2]


def logits_of(params, tokens, mesh=None) -> np.ndarray:
    @jax.jit
    def run(params):
        with using(mesh):
            return Backbone(CONFIG).apply({"params": params}, tokens)[0]

    return np.asarray(run(params))


class Text:
    """A tokenizer's stand-in."""

    def decode(self, ids, visible=()):
        return " ".join(map(str, ids))


def test_both_layouts_write_the_same_tokens():
    """Generated tokens do not depend on how the experts lie: prefill by groups, decoding one expert at a time."""
    packed, hopper = (
        generate_batch(Model(CONFIG, laid_out(name), Text()), [list(range(40, 70))], Greedy(), max_tokens=12)[0].tokens
        for name in ("packed", "hopper")
    )
    assert packed == hopper and len(hopper) == 12


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; on CPU they are simulated")
@pytest.mark.parametrize(("shape", "tokens"), [(MeshShape(tensor=2), 4), (MeshShape(expert=2, tensor=2), 40)])
def test_hopper_layout_on_a_mesh(shape, tokens):
    """Each device rearranges and multiplies its own experts or features; together they are one device within 1e-5."""
    tokens = np.random.default_rng(0).integers(0, 256, (1, tokens))
    mesh = make_mesh(shape)
    placed = place(PARAMS, mesh)
    params = laid_out("hopper", placed, mesh, consume=True)
    assert placed["layers_1"]["moe"]["gate"].codes.is_deleted()
    for leaf in jax.tree.leaves(params["layers_1"]["moe"]["experts"]):
        assert leaf.addressable_shards[0].data.size == leaf.size // shape.devices
    np.testing.assert_allclose(logits_of(params, tokens, mesh), logits_of(laid_out("packed"), tokens), atol=1e-5)


def test_the_kernel_is_refused_where_it_cannot_run():
    """A named backend is an error on a CPU, at sizes it does not serve, and when nobody knows it; by default nothing
    is.
    """
    name, _, params = layouts.for_device(CONFIG, PARAMS, backend="mosaic_gpu")
    assert name == "hopper"
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu' cannot serve this call: .*'cpu'.*; reference"):
        logits_of(params, np.zeros((1, 3), np.int32))
    narrow = dataclasses.replace(CONFIG, moe_intermediate_size=96)
    with pytest.raises(UserError, match="512 x 96"):
        laid_out("hopper", config=narrow)
    with pytest.raises(UserError, match="'cutlass' is unknown"):
        layouts.for_device(CONFIG, PARAMS, backend="cutlass")
    with pytest.raises(UserError, match="'other' is unknown; known: packed, hopper"):
        laid_out("other")
    assert layouts.for_device(CONFIG, PARAMS, backend="reference")[0] == "packed"
    assert layouts.for_device(CONFIG, PARAMS)[0] == "native"


def test_parameters_as_stored_are_not_run():
    """Without a layout, packed parameters are refused with the way to make them ready."""
    with pytest.raises(UserError, match=r"'qkv' is as files store it; `layouts.for_device`"):
        logits_of(PARAMS, np.zeros((1, 3), np.int32))


@pytest.mark.parametrize("layout", ["packed", "hopper"])
def test_the_abstract_tree_is_the_layouts_own(layout):
    """What is planned with has the shapes and dtypes of what is run, and devices share every container's arrays."""
    abstract = jax.eval_shape(lambda: PARAMS)
    planned, real = layouts.abstract(layout, CONFIG, abstract, "reference"), laid_out(layout)
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    for one, other in zip(jax.tree.leaves(planned), jax.tree.leaves(real)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
