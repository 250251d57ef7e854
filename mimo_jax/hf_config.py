"""`ModelConfig` from and to the HF `config.json` of the family: one table of keys, and the values understood."""

from __future__ import annotations

import re
from typing import Any

from mimo_jax.config import ModelConfig
from mimo_jax.errors import UserError

# HF key -> field. Every key here is required unless it appears in _OPTIONAL_KEYS.
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "hybrid_layer_pattern": "layer_pattern",
    "moe_layer_freq": "moe_pattern",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "swa_num_key_value_heads": "sliding_num_kv_heads",
    "head_dim": "head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "rope_theta": "rope_theta",
    "swa_rope_theta": "sliding_rope_theta",
    "sliding_window": "sliding_window",
    "partial_rotary_factor": "partial_rotary_factor",
    "attention_value_scale": "value_scale",
    "add_swa_attention_sink_bias": "sink_on_sliding",
    "add_full_attention_sink_bias": "sink_on_global",
    "layernorm_epsilon": "norm_eps",
    "max_position_embeddings": "max_position",
    "num_nextn_predict_layers": "mtp_layers",
    "attention_projection_layout": "qkv_layout",
    "initializer_range": "init_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_OPTIONAL_KEYS = {
    "num_nextn_predict_layers",
    "initializer_range",
    "attention_projection_layout",
    "partial_rotary_factor",
    "add_swa_attention_sink_bias",
    "add_full_attention_sink_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
}
# Keys whose other values would need mathematics this package does not have.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("mimo_v2", "mimo_v2_flash"),
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "n_group": (1, None),
    "topk_group": (1, None),
    "n_shared_experts": (None, 0),
    "routed_scaling_factor": (None, 1, 1.0),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
}


def from_hf(values: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Parses a HF config. Missing keys, and values this model family does not have, are errors naming the key."""
    for key, allowed in _REQUIRED_VALUES.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{where}: {key}={values[key]!r} is not supported; expected {allowed[0]!r}")
    for alias in ("swa_num_attention_heads", "swa_head_dim", "swa_v_head_dim", "sliding_window_size"):
        target = {"sliding_window_size": "sliding_window"}.get(alias, alias.removeprefix("swa_"))
        if alias in values and values[alias] != values.get(target):
            raise UserError(f"{where}: {alias}={values[alias]!r} must equal {target}={values.get(target)!r}")
    missing = [key for key in _KEYS if values.get(key) is None and key not in _OPTIONAL_KEYS]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    fields = {field: values[key] for key, field in _KEYS.items() if key in values and values[key] is not None}
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        if not isinstance(values[key], list):
            raise UserError(f"{where}: {key}={values[key]!r} must be a list with one entry per layer")
        fields[_KEYS[key]] = tuple(values[key])
    if isinstance(values.get("eos_token_id"), list) and values["eos_token_id"]:
        fields["eos_token_id"] = values["eos_token_id"][0]
    layers = values.get("num_hidden_layers", len(fields["layer_pattern"]))
    if layers != len(fields["layer_pattern"]):
        raise UserError(
            f"{where}: num_hidden_layers={layers} but hybrid_layer_pattern has {len(fields['layer_pattern'])} entries"
        )
    architectures = values.get("architectures") or ["MiMoV2ForCausalLM"]
    if not isinstance(architectures, list):
        raise UserError(f"{where}: architectures={architectures!r} must be a list with one name")
    fields["architecture"] = architectures[0]
    fields.setdefault("qkv_layout", "split" if values.get("model_type") == "mimo_v2_flash" else "fused_qkv")
    fields["storage"] = _storage_of(values.get("quantization_config"), where)
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {_with_hf_keys(str(error))}") from None
    except TypeError as error:
        raise UserError(f"{where}: a value has the wrong type ({error})") from None


def _with_hf_keys(message: str) -> str:
    """An error about a field, in the words of the file."""
    key_of = {field: key for key, field in _KEYS.items()}
    words = re.sub(r"\w+", lambda word: key_of.get(word[0], word[0]), message)
    return words.removeprefix("config: ")


def _storage_of(quantization: dict[str, Any] | None, where: str) -> str:
    if quantization is None:
        return "dense"
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        raise UserError(f"{where}: quantization_config must have quant_method 'fp8', found {quantization!r}")
    if quantization.get("weight_block_size") != [128, 128]:
        raise UserError(
            f"{where}: quantization_config.weight_block_size must be [128, 128], "
            f"found {quantization.get('weight_block_size')!r}"
        )
    store = quantization.get("store_dtype", "fp8")
    if store not in ("fp8", "mxfp4"):
        raise UserError(f"{where}: quantization_config.store_dtype={store!r} must be 'fp8' or 'mxfp4'")
    return store


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The HF `config.json` of `config`, with the keys that the published files carry."""
    values: dict[str, Any] = {key: getattr(config, field) for key, field in _KEYS.items()}
    values |= {
        "architectures": [config.architecture],
        "model_type": "mimo_v2_flash" if config.architecture == "MiMoV2FlashForCausalLM" else "mimo_v2",
        "num_hidden_layers": config.num_layers,
        "hybrid_layer_pattern": list(config.layer_pattern),
        "moe_layer_freq": list(config.moe_pattern),
        "swa_num_attention_heads": config.num_heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
        "sliding_window_size": config.sliding_window,
        "attention_chunk_size": config.sliding_window,
        "attention_bias": False,
        "hidden_act": "silu",
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": None,
        "routed_scaling_factor": None,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if config.linear_format == "fp8":
        values["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "store_dtype": config.storage,
            "ignored_layers": [f"model.layers.{layer}.self_attn.o_proj" for layer in range(config.num_layers)]
            + ["model.decoder.self_attn.o_proj"],
        }
    return values
