"""The name table against the published inventories and against the model's own parameter tree."""

import dataclasses
import math
from collections import Counter

import jax
import pytest

from mimo_jax.config.model import PUBLISHED, FileFormat
from mimo_jax.config.presets import preset, preset_format
from mimo_jax.config.towers import MEDIA_TOKENS, AudioConfig, AudioTokenizerConfig, MediaConfig, VisionConfig
from mimo_jax.modeling.audio import init_audio
from mimo_jax.modeling.audio_tokenizer import init_audio_tokenizer
from mimo_jax.modeling.backbone import abstract_params
from mimo_jax.modeling.dflash import abstract_drafter
from mimo_jax.modeling.vision import init_vision
from mimo_jax.sharding import MESH_AXES
from mimo_jax.weights import params
from tests.checkpoint.samples import small
from tests.tiny import in_format, tiny_config, tiny_drafter

SMALL_TOKENS = {name: index for index, name in enumerate(MEDIA_TOKENS)}
BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}


def tensors_of(config, file_format: FileFormat) -> dict:
    return params.expected_tensors(params.weights(config, file_format))


def census(config, file_format: FileFormat) -> Counter:
    """Elements by dtype."""
    counts = Counter()
    for dtype, shape in tensors_of(config, file_format).values():
        counts[dtype] += math.prod(shape)
    return counts


def test_pro_fp8_has_the_published_tensors() -> None:
    """The full-size FP8 checkpoint is covered exactly: 159,581 tensors, every element counted."""
    config, file_format = preset("mimo-v2.5-pro"), FileFormat("fp8")
    counts = census(config, file_format)
    assert len(tensors_of(config, file_format)) == 159_581
    assert counts.total() == 1_023_244_718_976
    assert round(sum(BYTES[dtype] * count for dtype, count in counts.items()) / 1e9, 2) == 1033.37


def test_pro_mxfp4_has_the_published_elements() -> None:
    """The FP4-DFlash checkpoint's elements by dtype are the published ones."""
    pro = preset("mimo-v2.5-pro"), PUBLISHED
    counts = census(*pro)
    assert len(tensors_of(*pro)) == 159_581
    assert counts == {
        "U8": 531_351_207_936,
        "F8_E4M3": 13_378_781_184,
        "F32": 163_648_512,
        "BF16": 9_450_733_440,
    }
    assert params.array_bytes(params.weights(*pro)) == 564_286_050_048


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.layers.0.self_attn.qkv_proj.weight", "F8_E4M3", (27136, 6144)),
        ("model.layers.0.self_attn.qkv_proj.weight_scale_inv", "F32", (216, 48)),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", "F32", (48, 128)),
        ("model.layers.1.self_attn.attention_sink_bias", "BF16", (128,)),
        ("model.layers.69.mlp.gate.weight", "F32", (384, 6144)),
        ("model.layers.1.mlp.experts.383.gate_proj.weight", "U8", (2048, 3072)),
        ("model.layers.1.mlp.experts.383.gate_proj.weight_scale", "U8", (2048, 192)),
        ("model.layers.1.mlp.experts.0.down_proj.weight_scale", "U8", (6144, 64)),
        ("model.mtp.layers.2.eh_proj.weight", "BF16", (6144, 12288)),
        ("model.mtp.layers.0.self_attn.qkv_proj.weight_scale_inv", "F32", (216, 48)),
    ],
)
def test_pro_rows_of_the_published_table(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Single rows of the published table, copied from it."""
    assert tensors_of(preset("mimo-v2.5-pro"), PUBLISHED)[name] == (dtype, shape)


def test_v25_and_flash_spot_checks() -> None:
    """V2.5's ragged grids and V2-Flash's split projections have the published shapes."""
    v25 = tensors_of(preset("mimo-v2.5"), preset_format("mimo-v2.5"))
    at = "model.layers.{}.self_attn.qkv_proj.weight{}"
    assert v25[at.format(0, "")][1] == (13568, 4096) and v25[at.format(0, "_scale_inv")][1] == (108, 32)
    assert v25[at.format(1, "")][1] == (14848, 4096) and v25[at.format(1, "_scale_inv")][1] == (116, 32)
    flash = tensors_of(preset("mimo-v2-flash"), preset_format("mimo-v2-flash"))
    assert flash["model.layers.1.self_attn.k_proj.weight"] == ("F8_E4M3", (1536, 4096))
    assert flash["model.layers.1.self_attn.v_proj.weight_scale_inv"] == ("F32", (8, 32))
    assert not any("qkv_proj" in name for name in flash)


def test_towers_have_the_published_tensors() -> None:
    """459 tensors of towers make up MiMo-V2.5's 73,081 and V2.6-Pro's 160,040, elements by dtype as published."""
    for name, total in (("mimo-v2.5", 73_081), ("mimo-v2.6-pro", 160_040)):
        held = tensors_of(preset(name), preset_format(name))
        assert len(held) == total
        assert sum(tensor.startswith(("visual.", "audio_encoder.", "speech_embeddings.")) for tensor in held) == 459
    assert census(preset("mimo-v2.6-pro"), preset_format("mimo-v2.6-pro")) == {
        "U8": 531_351_207_936,
        "F8_E4M3": 13_378_781_184,
        "F32": 857_088,
        "BF16": 10_647_286_656,
    }


def test_the_audio_tokenizer_has_the_published_tensors() -> None:
    """389 tensors, the codebooks in float32."""
    held = params.expected_tensors(params.tokenizer_weights(AudioTokenizerConfig(), "bfloat16"))
    counts = Counter()
    for dtype, shape in held.values():
        counts[dtype] += math.prod(shape)
    assert len(held) == 389 and counts == {"BF16": 307_927_040, "F32": 4_587_520}
    assert held["encoder.quantizer.vq.layers.2._codebook.embed"] == ("F32", (256, 1024))
    assert "encoder.layers.0.self_attn.k_proj.bias" not in held


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("visual.patch_embed.proj.weight", (1280, 3, 2, 16, 16)),
        ("visual.blocks.1.attn.qkv.weight", (3072, 1280)),
        ("visual.blocks.1.attn.sinks", (32,)),
        ("visual.blocks.27.mlp.down_proj.bias", (1280,)),
        ("visual.merger.mlp.2.weight", (4096, 5120)),
        ("audio_encoder.input_local_transformer.layers.5.self_attn.k_proj.bias", (1024,)),
        ("audio_encoder.projection.mlp.0.weight", (16384, 4096)),
        ("speech_embeddings.19.weight", (1280, 1024)),
    ],
)
def test_rows_of_towers_in_the_published_table(name: str, shape: tuple[int, ...]) -> None:
    """Single rows of the published table, copied from it."""
    assert tensors_of(preset("mimo-v2.5"), preset_format("mimo-v2.5"))[name] == ("BF16", shape)


def test_table_is_the_towers_trees() -> None:
    """Every leaf of the modules' trees has its row, with its shape, and no row is without a leaf."""
    config = dataclasses.replace(
        tiny_config(),
        vision=VisionConfig(tiny_config().hidden_size, (-1, 0, 1), 32, 48, num_heads=4, num_kv_heads=2, head_dim=16),
        audio=AudioConfig(tiny_config().hidden_size, channels=3, hidden_size=32, num_layers=2, num_heads=4),
        media=MediaConfig(**SMALL_TOKENS),
    )
    tokenizer = AudioTokenizerConfig((16, 8), hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48)
    table = params.abstract_tree(params.weights(config, FileFormat()))
    held = params.abstract_tree(params.tokenizer_weights(tokenizer, "float32"))
    key = jax.random.key(0)
    for tree, init in (
        (table["vision"], lambda: init_vision(config.vision, key)),
        (table["audio"], lambda: init_audio(config.audio, key)),
        (held, lambda: init_audio_tokenizer(tokenizer, key)),
    ):
        expected = jax.eval_shape(init)
        assert jax.tree.structure(expected) == jax.tree.structure(tree)
        assert [leaf.shape for leaf in jax.tree.leaves(expected)] == [leaf.shape for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", ["dense", "fp8", "mxfp4"])
@pytest.mark.parametrize("is_fused", [True, False])
def test_table_is_the_parameter_tree(name: str, is_fused: bool) -> None:
    """Every leaf of the model's tree has its row, with its shape and dtype, and no row is without a leaf."""
    config = small(fused_qkv=is_fused)
    expected = jax.eval_shape(lambda plain: in_format(config, plain, name, "bfloat16"), abstract_params(config))
    table = params.abstract_tree(params.weights(config, FileFormat(name)))
    assert jax.tree.structure(expected) == jax.tree.structure(table)
    assert jax.tree.leaves(jax.tree.map(lambda a: (a.shape, a.dtype), expected)) == jax.tree.leaves(
        jax.tree.map(lambda a: (a.shape, a.dtype), table)
    )


@pytest.mark.parametrize("changes", [{}, {"bias_rank": 3, "lookup": 5}, {"has_sink": False}])
def test_table_is_the_drafters_tree(changes) -> None:
    """The same of a drafter, whose files store every leaf plainly."""
    config = tiny_drafter(**changes)
    expected, table = abstract_drafter(config), params.abstract_tree(params.drafter_weights(config, "float32"))
    assert jax.tree.structure(expected) == jax.tree.structure(table)
    assert [leaf.shape for leaf in jax.tree.leaves(expected)] == [leaf.shape for leaf in jax.tree.leaves(table)]


def test_names_and_leaves_are_in_bijection() -> None:
    """No name is given twice, and the tensors hold as many elements as the tree's arrays."""
    config, table = small(), list(params.weights(small(), PUBLISHED))
    listed = [name for weight in table for _, _, name in params.tensors_of(weight)]
    assert len(listed) == len(set(listed)) == len(params.expected_tensors(iter(table)))
    held = jax.eval_shape(lambda plain: in_format(config, plain, "mxfp4", "bfloat16"), abstract_params(config))
    assert census(config, PUBLISHED).total() == sum(leaf.size for leaf in jax.tree.leaves(held))


def test_a_path_that_both_trees_have_means_one_thing() -> None:
    """Target and drafter share paths; how such a weight is sharded, trained and multiplied does not depend on whose it
    is.
    """
    for row in params._DRAFTER:
        shared = params.ROWS[row.path]
        assert (row.axes, row.optimizer, row.is_matrix) == (shared.axes, shared.optimizer, shared.is_matrix)
    assert set(MESH_AXES) - {"batch"} <= {axis for row in params.ROWS.values() for axis in row.axes.split()}
