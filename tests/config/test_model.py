"""The configuration: published files are read exactly, anything else is refused with the key's name."""

import dataclasses
import json

import pytest

from mimo_jax.checkpoint.huggingface import read_hf_config
from mimo_jax.config.huggingface import from_hf, to_hf
from mimo_jax.config.model import GLOBAL, SLIDING
from mimo_jax.config.presets import PRESETS, preset, preset_format
from mimo_jax.errors import UserError


def published(name: str = "mimo-v2.5-pro", **changes) -> dict:
    values = to_hf(preset(name), preset_format(name)) | changes
    return {key: value for key, value in values.items() if value != "absent"}


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name):
    """Writing a preset as config.json and reading it back changes nothing that the file can hold."""
    config, file_format = PRESETS[name], preset_format(name)
    found, found_format = from_hf(json.loads(json.dumps(to_hf(config, file_format))))
    # What activations are computed in is this program's choice, not the checkpoint's.
    assert dataclasses.replace(found, dtype=config.dtype) == config
    assert found_format.name == file_format.name


def test_pro_is_the_published_geometry():
    """The Pro preset has the published layer schedule, heads and rotary bases."""
    config = preset("mimo-v2.5-pro")
    pattern = config.layer_pattern
    assert [layer for layer in range(70) if pattern[layer] == GLOBAL] == [0, 7, 15, 23, 31, 39, 47, 55, 62, 69]
    assert config.theta(GLOBAL) == 1e7 and config.theta(SLIDING) == 1e4
    assert not config.has_sink(GLOBAL) and config.has_sink(SLIDING)
    assert (config.kv_heads(GLOBAL), config.kv_heads(SLIDING), config.qkv_chunks) == (8, 8, 8)
    assert preset("mimo-v2.5").kv_heads(SLIDING) == 8 and preset("mimo-v2.5").qkv_chunks == 4


@pytest.mark.parametrize("window", [128, 129])
def test_both_window_conventions(window):
    """A window of 128 or of 129 keys is a config value."""
    assert from_hf(published(sliding_window=window, sliding_window_size=window))[0].sliding_window == window


def test_the_file_format_follows_the_quantization_config():
    """The quantisation section decides how weights are read: MXFP4 experts, FP8 throughout, or plain arrays."""
    assert from_hf(published())[1].name == "mxfp4"
    assert from_hf(published("mimo-v2.5"))[1].name == "fp8"
    quantization = published()["quantization_config"]
    without_store = {key: value for key, value in quantization.items() if key != "store_dtype"}
    assert from_hf(published(quantization_config=without_store))[1].name == "fp8"
    assert from_hf(published(quantization_config="absent"))[1].name == "dense"


REFUSED = [
    ({"hidden_size": "absent"}, "missing hidden_size"),
    ({"hidden_size": None}, "missing hidden_size"),
    ({"hybrid_layer_pattern": None}, "missing hybrid_layer_pattern"),
    ({"rope_theta": "absent", "vocab_size": "absent"}, "missing vocab_size, rope_theta"),
    ({"hidden_size": "6144"}, "hidden_size='6144'"),
    ({"hidden_size": 6144.5}, "hidden_size=6144.5"),
    ({"hidden_size": True}, "hidden_size=True"),
    ({"vocab_size": -1}, "vocab_size=-1"),
    ({"rope_theta": float("nan")}, "rope_theta=nan"),
    ({"layernorm_epsilon": 0}, "layernorm_epsilon=0"),
    ({"sliding_window": 0, "sliding_window_size": 0}, "sliding_window=0"),
    ({"sliding_window_size": 127}, "sliding_window_size=127 must equal sliding_window=128"),
    ({"swa_head_dim": 128}, "swa_head_dim=128 must equal head_dim=192"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
    ({"n_group": 4}, "n_group=4 is not supported"),
    ({"n_shared_experts": 1}, "n_shared_experts=1 is not supported"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 is not supported"),
    ({"attention_bias": True}, "attention_bias=True is not supported"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling={'type': 'yarn'} is not supported"),
    ({"model_type": "llama"}, "model_type='llama' is not supported"),
    ({"architectures": ["LlamaForCausalLM"]}, "architecture='LlamaForCausalLM'"),
    ({"architectures": 7}, "architectures=7"),
    ({"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern has 2 entries"),
    ({"hybrid_layer_pattern": "0101"}, "hybrid_layer_pattern='0101' must be a list"),
    ({"hybrid_layer_pattern": [0, 2] * 35}, "hybrid_layer_pattern=.* may hold only 0 and 1"),
    ({"hybrid_layer_pattern": [[0]] * 70}, "may hold only 0 and 1"),
    ({"moe_layer_freq": [1]}, "moe_layer_freq 1"),
    ({"num_experts_per_tok": 385}, "num_experts_per_tok=385 must lie in 1..n_routed_experts=384"),
    ({"num_key_value_heads": 7}, "must be a multiple of num_key_value_heads=7"),
    ({"partial_rotary_factor": 0.33}, "gives 63 rotary dimensions"),
    ({"moe_intermediate_size": 2050}, "moe_intermediate_size=2050 must be a multiple of the MXFP4 block, 32"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1"),
    ({"add_swa_attention_sink_bias": "yes"}, "add_swa_attention_sink_bias='yes'"),
    ({"eos_token_id": []}, "eos_token_id=\\[\\]"),
    ({"eos_token_id": 200_000}, "eos_token_id=200000 must be a token id below vocab_size=152576"),
    ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters: rope_type='yarn'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 64e4}}, "rope_theta=640000.0 must equal rope_theta="),
    ({"rope_parameters": {"full_attention": {"factor": 8.0}}}, "rope_parameters: factor=8.0 is not supported"),
    ({"rope_parameters": {"sliding_attention": 3}}, "rope_parameters: sliding_attention=3 is not supported"),
    ({"rope_parameters": 5}, "rope_parameters=5 must be a table"),
    ({"layer_types": ["full_attention"] * 70}, "layer_types and hybrid_layer_pattern say different things"),
    ({"mlp_layer_types": ["moe"]}, "mlp_layer_types must be a list of dense and sparse"),
    ({"first_k_dense_replace": 3}, "first_k_dense_replace=3 must be 1"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
    ({"use_qk_norm": True}, "use_qk_norm=True is not supported"),
    ({"layernorm_epsilon": 1e-60}, "layernorm_epsilon=1e-60 must be a positive number, from 1.2e-38"),
    ({"sliding_window": 2**31, "sliding_window_size": 2**31}, "sliding_window=2147483648 must be a positive number"),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}},
        "quantization_config.fmt='e5m2' must be 'e4m3'",
    ),
    ({"attention_projection_layout": "interleaved"}, "attention_projection_layout='interleaved'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'fp8'"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size must be"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "weight_block_size must be"),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "store_dtype": "nvfp4"}},
        "store_dtype='nvfp4' must be 'fp8' or 'mxfp4'",
    ),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[message for _, message in REFUSED])
def test_bad_values_name_the_key(changes, message):
    """A missing, mistyped or unsupported value ends in one line that names the file and the key."""
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("}", r"\}")) as caught:
        from_hf(published(**changes), "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ") and "\n" not in str(caught.value)


def test_every_end_token_of_a_list_counts():
    """Published files may list several end-of-text ids; all end a text, and all are written again."""
    config, file_format = from_hf(published(eos_token_id=[151_645, 151_643]))
    assert config.eos_token_id == (151_645, 151_643)
    assert to_hf(config, file_format)["eos_token_id"] == [151_645, 151_643]
    assert from_hf(published(eos_token_id=[151_645]))[0].eos_token_id == 151_645


PLAIN = {"rope_type": "default"}
FULL, SLIDING_BASE = PLAIN | {"rope_theta": 5e6}, PLAIN | {"rope_theta": 1e4, "partial_rotary_factor": 0.334}


def test_rope_parameters_are_honoured():
    """What transformers 5 writes in place of the rotary keys, or beside them, is read or must agree."""
    bases = {"full_attention": FULL, "sliding_attention": SLIDING_BASE}
    changes = {"rope_theta": "absent", "swa_rope_theta": "absent", "partial_rotary_factor": None}
    config, _ = from_hf(published(rope_parameters=bases, **changes))
    assert (config.rope_theta, config.sliding_rope_theta, config.rotary_dim) == (5e6, 1e4, 64)
    config, _ = from_hf(published(rope_parameters=PLAIN, rope_scaling=PLAIN))
    assert config.rope_theta == 1e7
    layers = [0, 1, 1, 0]
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    changes = {"hybrid_layer_pattern": "absent", "moe_layer_freq": "absent", "num_hidden_layers": 4}
    config, _ = from_hf(published(layer_types=types, mlp_layer_types=["dense"] + ["sparse"] * 3, **changes))
    assert list(config.layer_pattern) == layers and config.moe_pattern == (0, 1, 1, 1)


def test_null_is_as_good_as_absent():
    """Writers that spell out every field leave null where they have nothing to say."""
    nulls = dict.fromkeys(["hidden_act", "scoring_func", "attention_bias", "n_group", "norm_topk_prob", "swa_head_dim"])
    assert from_hf(published(**nulls))[0] == from_hf(published())[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "[" * 100_000], ids=repr)
def test_unreadable_files(tmp_path, text):
    """A file that is no JSON object is a one-line error with its path."""
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json: ") as caught:
        read_hf_config(tmp_path)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_unknown_preset_lists_the_known():
    """A misspelt preset says which exist."""
    with pytest.raises(UserError, match=r"'mimo' is unknown; known: mimo-v2\.5-pro, .*mimo-tiny"):
        preset("mimo")
