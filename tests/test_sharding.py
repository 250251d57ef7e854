"""The model on eight simulated devices: the same answers, every byte where it belongs, and no collective too many."""

import collections
import contextlib
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax import sharding
from mimo_jax.config.model import PUBLISHED
from mimo_jax.config.presets import preset
from mimo_jax.decode.controls import alike
from mimo_jax.decode.drafter import PLAIN
from mimo_jax.decode.loop import _decode, prefill, row_keys, start, with_media
from mimo_jax.decode.sampling import Greedy, Sampled
from mimo_jax.decode.step import FlaxStep
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.errors import UserError
from mimo_jax.generation import generate_batch
from mimo_jax.loading import Model
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.cache import init_cache
from mimo_jax.modeling.dflash import init_drafter
from mimo_jax.planning.hlo import executed, is_collective, result_shape
from mimo_jax.sharding import MeshShape, check_fits, make_mesh, place, place_batch, using, weight_bytes
from mimo_jax.training import drafter
from mimo_jax.training.drafter import DraftTrainConfig
from mimo_jax.training.pretraining import TrainConfig, init_state
from mimo_jax.training.qat import begin, qat_step
from mimo_jax.training.self_distillation import Texts
from mimo_jax.weights.params import abstract_tree, weights
from tests.tiny import init_in_format, tiny_config, tiny_drafter

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; on CPU they are simulated")

EIGHT = {"num_heads": 8, "num_kv_heads": 8, "sliding_num_kv_heads": 8, "head_dim": 12, "v_head_dim": 8}
CONFIG = tiny_config(**EIGHT, intermediate_size=1024, moe_intermediate_size=256)
DRAFTER = tiny_drafter(num_heads=8, num_kv_heads=8, head_dim=8, num_target_layers=4)
HALF_THE_HEADS = {"num_heads": 4, "num_kv_heads": 4, "sliding_num_kv_heads": 4}
MESHES = {
    "TP8": MeshShape(tensor=8),
    "EP2xTP4": MeshShape(expert=2, tensor=4),
    "EP4xTP2": MeshShape(expert=4, tensor=2),
    "EP8": MeshShape(expert=8),
    "data 2 x TP4": MeshShape(data=2, tensor=4),
}
PROMPTS = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in (5, 21)]


@functools.cache
def params_of(file_format: str):
    return init_in_format(CONFIG, file_format)


def model_of(file_format: str, shape: MeshShape | None, tokenizer=None, drafter=PLAIN) -> Model:
    params = params_of(file_format)
    draft_params = {} if drafter is PLAIN else init_drafter(DRAFTER, jax.random.key(1))
    mesh = None if shape is None else make_mesh(shape)
    params, draft_params = place(params, mesh), place(draft_params, mesh)
    return Model(CONFIG, params, tokenizer, drafter=drafter, draft_params=draft_params, mesh=mesh)


def logits_of(model: Model, tokens: np.ndarray) -> np.ndarray:
    @jax.jit
    def run(params):
        with using(model.mesh):
            return Backbone(model.config).apply({"params": params}, tokens)[0]

    return np.asarray(run(model.params))


# Few tokens visit experts one by one, many are grouped by them.
CASES = [*((mesh, "dense", 40) for mesh in MESHES), ("TP8", "dense", 4), ("EP8", "dense", 4)]
CASES += [("TP8", "mxfp4", 4), ("EP2xTP4", "mxfp4", 40)]


@pytest.mark.parametrize(("mesh", "file_format", "length"), CASES)
def test_logits_are_those_of_one_device(mesh, file_format, length):
    """Every mesh gives one device's logits within 1e-5 in float32, for packed and plain weights."""
    tokens = np.random.default_rng(0).integers(0, 256, (2, length))
    one, many = (logits_of(model_of(file_format, where), tokens) for where in (None, MESHES[mesh]))
    assert np.abs(one).max() > 0.5
    np.testing.assert_allclose(many, one, atol=1e-5)


@pytest.mark.parametrize("mesh", ["EP2xTP4", "data 2 x TP4"])
def test_rows_of_media_are_read_on_a_mesh(mesh):
    """Whole on every device, in the place of embeddings whose vocabulary is sharded."""
    rows = np.random.default_rng(0).normal(0, 0.1, (64, CONFIG.hidden_size)).astype(np.float32)
    prompts = [[7, *range(256, 280), 9], [3, *range(280, 300)]]
    found = []
    for shape in (None, MESHES[mesh]):
        model = model_of("dense", shape)
        found.append(np.asarray(prefill(model.decoder, with_media(model.weights, rows), prompts, 64)[2]))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    other = np.asarray(prefill(model.decoder, with_media(model.weights, -rows), prompts, 64)[2])
    assert np.abs(other - found[0]).max() > 0.05


class Text:
    """A tokenizer's stand-in."""

    def decode(self, ids, visible=()):
        return " ".join(map(str, ids))


DFLASH, SAMPLED = DFlashDrafter(DRAFTER), Sampled(0.8, top_k=20, top_p=0.9)


@pytest.mark.parametrize(
    ("mesh", "drafter", "strategy"),
    [
        ("TP8", PLAIN, SAMPLED),
        ("TP8", DFLASH, Greedy()),
        ("EP2xTP4", DFLASH, SAMPLED),
        ("EP8", PLAIN, Greedy()),
        ("data 2 x TP4", DFLASH, Greedy()),
    ],
)
def test_generation_is_that_of_one_device(mesh, drafter, strategy):
    """A batch's tokens are one device's, token for token, drafted or not, greedy or sampled."""
    one, many = (
        generate_batch(model_of("dense", where, Text(), drafter), PROMPTS, strategy, max_tokens=20, seed=3)
        for where in (None, MESHES[mesh])
    )
    assert [row.tokens for row in many] == [row.tokens for row in one]
    assert [row.acceptance for row in many] == [row.acceptance for row in one]


@pytest.mark.parametrize(("mesh", "file_format"), [("TP8", "mxfp4"), ("EP2xTP4", "dense"), ("EP8", "mxfp4")])
def test_a_token_has_the_same_logits_alone_and_in_a_block(mesh, file_format):
    """After one cache, a block of 8 and its tokens in smaller blocks, bit for bit; and again when repeated."""
    model, tokens = model_of(file_format, MESHES[mesh]), np.random.default_rng(0).integers(0, 256, (1, 20))
    step = jax.jit(FlaxStep(model.config, (), model.mesh))
    empty = place(init_cache(model.config, 1, 256), model.mesh)
    prompt = step(model.params, tokens[:, :12], empty, jnp.array([12]))[2]
    block = [np.asarray(step(model.params, tokens[:, 12:], prompt, jnp.array([8]))[0]) for _ in range(2)]
    np.testing.assert_array_equal(*block)
    for sizes in ([1] * 8, [3, 5]):
        cache, parts, first = prompt, [], 12
        for size in sizes:
            logits, _, cache = step(model.params, tokens[:, first : first + size], cache, jnp.array([size]))
            parts.append(np.asarray(logits))
            first += size
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), block[0])


def test_chunk_g_of_the_fused_projection_lies_on_device_g():
    """At TP8 every device holds its own chunk of QKV, its own eighth of every other matrix, and nothing twice."""
    params = params_of("mxfp4")
    placed = place(params, make_mesh(MESHES["TP8"]))
    codes = params["layers_0"]["attention"]["qkv"].tensor.codes
    for shard in placed["layers_0"]["attention"]["qkv"].tensor.codes.addressable_shards:
        assert shard.index[0] == slice(shard.device.id, shard.device.id + 1)
        np.testing.assert_array_equal(np.asarray(shard.data)[0], np.asarray(codes)[shard.device.id])
    large = [leaf for leaf in jax.tree.leaves(placed) if leaf.size > 4096]
    assert len(large) > 20
    for leaf in large:
        assert leaf.addressable_shards[0].data.size == leaf.size // 8


SHORT = dataclasses.replace(CONFIG, layer_pattern=(0, 1), moe_pattern=(0, 1))
TRAIN = TrainConfig(batch=8, length=32, peak_rate=3e-3, warmup=1, decay_steps=5, qat=True)
WINDOWS = np.random.default_rng(1).integers(0, 256, (2, 8, 33)).astype(np.int32)


def losses(state, step, shape: MeshShape | None) -> list[dict[str, float]]:
    """Metrics of updates on the windows, the state spread over a mesh if there is one."""
    mesh = None if shape is None else make_mesh(shape)
    state = state if mesh is None else place(state, mesh)
    found = []
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for window in WINDOWS:
            state, metrics = step(state, place_batch(window, mesh))
            found.append({name: float(value) for name, value in metrics.items()})
    return found


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("QAT", MeshShape(2, 2, 2)),
        ("drafter", MeshShape(data=2, tensor=4)),
    ],  # QAT's masters take the steps of pretraining
)
def test_training_on_a_mesh_has_one_devices_losses(kind, shape):
    """Losses and gradient norms of two updates, Muon on sharded matrices included, are one device's."""
    if kind == "drafter":
        model, draft_train = model_of("dense", None), DraftTrainConfig(steps=4, batch=8, anchors=4)
        starts, ends = np.full(8, 2), np.full(8, 32)

        def update(where):
            target = model.params if where is None else place(model.params, make_mesh(where))
            step = functools.partial(drafter.train_step, target=CONFIG, config=DRAFTER, train=draft_train)
            return lambda state, batch: step(state, target, Texts(batch[:, :32], starts, ends))

        def fresh():
            return drafter.init_state(DRAFTER, draft_train)
    else:

        def update(where):
            return lambda state, batch: qat_step(state, batch, SHORT, TRAIN)

        def fresh():
            return begin(init_state(SHORT, TRAIN), TRAIN)

    one, many = (losses(fresh(), update(where), where) for where in (None, shape))
    for expected, found in zip(one, many):
        assert found == pytest.approx(expected, rel=1e-4)


COLLECTIVE = re.compile(
    r"= (\w+)\[([\d,]+)\]\{\S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
)


@pytest.mark.parametrize("mesh", ["TP8", "EP2xTP4", "EP8"])
def test_a_step_reduces_twice_per_layer_and_moves_no_weight(mesh):
    """A compiled step: one sum for the embedding, two per layer, the router's scores; no gathered weight."""
    model = model_of("mxfp4", MESHES[mesh])
    cache = place(init_cache(model.config, 1, 256), model.mesh)
    # Without the most likely tokens: two more sums over devices, where greedy decoding asks for them.
    step = jax.jit(lambda *arguments: FlaxStep(model.config, (), model.mesh)(*arguments)[::2])
    text = step.lower(model.params, jnp.zeros((1, 8), jnp.int32), cache, jnp.array([8])).compile().as_text()
    found = collections.Counter()
    for dtype, dims, kind in COLLECTIVE.findall(text):
        found[dtype, math.prod(map(int, dims.split(","))), kind] += 1
    dense, routed = model.config.moe_pattern.count(0), model.config.moe_pattern.count(1)
    assert found == {
        ("f32", 8 * 64, "all-reduce"): 1 + len(model.config.moe_pattern) + dense + routed,
        ("f32", 8 * 8, "all-gather"): routed,
    }


def test_sampling_never_brings_the_vocabulary_together():
    """A drafted round with every filter: what devices exchange of the logits are sums and maxima of rows, no row."""
    model = model_of("mxfp4", MESHES["TP8"], drafter=DFLASH)
    controls, limits = alike(Sampled(0.8, top_k=20, top_p=0.9, min_p=0.01), [], 1), np.array([9], np.int32)
    cache, draft_cache, logits = prefill(model.decoder, model.weights, [[1, 2, 3]], 256)
    state = start(model.decoder, cache, draft_cache, logits, limits, row_keys([0]), controls)
    text = _decode.lower(model.decoder, model.weights, state, controls, np.int32(1)).compile().as_text()
    moved = [step.instruction for step in executed(text) if is_collective(step.instruction)]
    assert len(moved) > 50
    # Router scores of 8 tokens; the sums of 64 groups of tokens that a draw chooses from.
    assert {result_shape(one) for one in moved if one.opcode == "all-gather"} == {"f32[8,8]", "f32[1,64]"}
    assert all(
        one.opcode in ("all-gather", "all-reduce") and str(model.config.vocab_size) not in one.shape for one in moved
    )


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ({"tensor": 8}, HALF_THE_HEADS, r"num_heads=4 cannot be split over 8 devices"),
        ({"expert": 8}, {"num_experts": 4}, r"num_experts=4 cannot be split over 8"),
        ({"tensor": 8}, {"vocab_size": 300}, r"vocab_size=300 cannot be split over 8"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_named(shape, changes, message):
    """Heads, experts and rows that a mesh cannot share are an error with both numbers."""
    with pytest.raises(UserError, match=message):
        MeshShape(**shape).check_divides(dataclasses.replace(CONFIG, **changes))


def test_quantised_blocks_are_never_split():
    """A block of scales belongs to one device: what would split one is an error that names the parameter."""
    config = dataclasses.replace(CONFIG, moe_intermediate_size=64)
    params = abstract_tree(weights(config, PUBLISHED))
    with pytest.raises(
        UserError, match=r"mesh: layers_1/moe/down/scales \[8, 64, 2\]: its 2 rows along expert_features"
    ):
        place(params, make_mesh(MESHES["TP8"]))


def test_weights_that_do_not_fit_are_counted_before_anything_is_read(monkeypatch):
    """Each of eight H200 holds 70.8 GB of Pro's weights (within 3 %); four cannot, and the error has the numbers."""
    config = preset("mimo-v2.5-pro")
    needed = weight_bytes(weights(config, PUBLISHED), make_mesh(MESHES["TP8"]))
    assert needed == pytest.approx(70.8e9, rel=0.03)
    monkeypatch.setattr(sharding, "device_memory", lambda mesh: 141 * 10**9)
    check_fits(config, PUBLISHED, make_mesh(MESHES["TP8"]))
    with pytest.raises(
        UserError, match=r"14\d\.\d GB of weights for each of 4 devices, which hold 141.0 GB; 5 devices"
    ):
        check_fits(config, PUBLISHED, make_mesh(MeshShape(tensor=4)))


def test_a_batch_that_copies_cannot_share_is_counted():
    """One prompt for two copies of the model is an error with both numbers, before anything runs."""
    with pytest.raises(UserError, match=r"mesh: 1 prompts cannot be shared equally by data=2 copies"):
        generate_batch(model_of("dense", MESHES["data 2 x TP4"], Text()), PROMPTS[:1], max_tokens=2)


def test_too_few_devices_are_counted():
    """A mesh for more devices than there are says how many are needed and found."""
    with pytest.raises(UserError, match=r"tensor=16 needs 16 devices; 8 found"):
        make_mesh(MeshShape(tensor=16))
    with pytest.raises(UserError, match=r"expert=0 must be a positive integer"):
        MeshShape(expert=0)
