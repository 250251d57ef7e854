"""The published `config.json` of a model, to and from our config and file format."""

from __future__ import annotations

from typing import Any

from mimo_jax.config.media import towers_from_hf, towers_to_hf
from mimo_jax.config.model import FileFormat, ModelConfig
from mimo_jax.config.schema import Schema
from mimo_jax.errors import UserError

MODEL = Schema(
    name="config",
    keys={
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
        "initializer_range": "init_range",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
    },
    optional=frozenset(
        {
            "num_nextn_predict_layers",
            "initializer_range",
            "partial_rotary_factor",
            "add_swa_attention_sink_bias",
            "add_full_attention_sink_bias",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "max_position_embeddings",
        }
    ),
    required={
        "model_type": ("mimo_v2", "mimo_v2_flash"),
        "hidden_act": ("silu",),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
        "n_group": (1,),
        "topk_group": (1,),
        "n_shared_experts": (0,),
        "routed_scaling_factor": (1,),
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
        "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
        # Of other families: what would change the numbers is never passed over.
        **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), (None,)),
        **dict.fromkeys(("clip_qkv", "swiglu_limit", "attention_multiplier"), (None,)),
        **dict.fromkeys(
            ("use_qk_norm", "qk_norm", "qk_layernorm", "mlp_bias", "use_bias", "rope_interleave"), (False,)
        ),
        **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"), (1,)),
        "use_sliding_window": (True,),
        "mlp_only_layers": ([],),
        "decoder_sparse_step": (1,),
    },
    equal={
        "swa_num_attention_heads": "num_attention_heads",
        "swa_head_dim": "head_dim",
        "swa_v_head_dim": "v_head_dim",
        "sliding_window_size": "sliding_window",
    },
)


# attention_projection_layout -> `ModelConfig.fused_qkv`
_PROJECTIONS = {"fused_qkv": True, "split": False}


def from_hf(values: dict[str, Any], where: str = "config.json") -> tuple[ModelConfig, FileFormat]:
    """A model's config, and how its files store weights; the dtype of plain ones is only seen in the files."""
    values = _with_layer_types(_with_rope_parameters(values, where), where)
    fields = MODEL.find(values, where)
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        if not isinstance(values[key], list):
            raise UserError(f"{where}: {key}={values[key]!r} must be a list with one entry per layer")
        fields[MODEL.keys[key]] = tuple(values[key])
    if isinstance(fields.get("eos_token_id"), list) and fields["eos_token_id"]:
        ids = fields["eos_token_id"]
        fields["eos_token_id"] = tuple(ids) if len(ids) > 1 else ids[0]
    layers = values.get("num_hidden_layers", len(fields["layer_pattern"]))
    if layers != len(fields["layer_pattern"]):
        raise UserError(
            f"{where}: num_hidden_layers={layers} but hybrid_layer_pattern has {len(fields['layer_pattern'])} entries"
        )
    fields["architecture"] = _architecture(values, where)
    fields["fused_qkv"] = _is_fused(values, where)
    fields |= towers_from_hf(values, where)
    router = values.get("moe_router_dtype") or "float32"
    file_format = FileFormat(_format_name(values.get("quantization_config"), where), router=router)
    try:
        config = ModelConfig(**fields)
        file_format.check_fits(config)
        return config, file_format
    except UserError as error:
        raise MODEL.in_words_of_the_file(error, where) from None
    except TypeError as error:
        raise UserError(f"{where}: a value has the wrong type ({error})") from None


# Layer type of transformers 5 -> the key of its rotary base, and its number in `hybrid_layer_pattern`.
_LAYER_TYPES = {"full_attention": ("rope_theta", 0), "sliding_attention": ("swa_rope_theta", 1)}


def _with_rope_parameters(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, one table or one for each layer type, as the keys they stand for."""
    given = values.get("rope_parameters")
    if given is None:
        return values
    if not isinstance(given, dict):
        raise UserError(f"{where}: rope_parameters={given!r} must be a table")
    told = dict(values)
    for kind, (key, _) in _LAYER_TYPES.items():
        table = given.get(kind, {}) if _LAYER_TYPES.keys() & given.keys() else given
        for name, value in table.items() if isinstance(table, dict) else [(kind, table)]:
            if name in ("rope_theta", "partial_rotary_factor"):
                own = key if name == "rope_theta" else name
                if told.get(own) not in (None, value):
                    raise UserError(f"{where}: rope_parameters: {name}={value!r} must equal {own}={told[own]!r}")
                told[own] = value
            elif name not in ("rope_type", "type") or value != "default":
                raise UserError(f"{where}: rope_parameters: {name}={value!r} is not supported; expected 'default'")
    return told


def _with_layer_types(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Lists of layer types, as transformers 5 writes them, as the patterns they stand for."""
    told = dict(values)
    for key, pattern, numbers in (
        ("layer_types", "hybrid_layer_pattern", {kind: number for kind, (_, number) in _LAYER_TYPES.items()}),
        ("mlp_layer_types", "moe_layer_freq", {"dense": 0, "sparse": 1}),
    ):
        types = values.get(key)
        if types is None:
            continue
        if not isinstance(types, list) or not all(isinstance(kind, str) and kind in numbers for kind in types):
            raise UserError(f"{where}: {key} must be a list of {' and '.join(numbers)}")
        found = [numbers[kind] for kind in types]
        if told.get(pattern) not in (None, found):
            raise UserError(f"{where}: {key} and {pattern} say different things of the layers")
        told[pattern] = found
    leading, pattern = values.get("first_k_dense_replace"), told.get("moe_layer_freq")
    if leading is None or not isinstance(pattern, list):
        return told
    dense = pattern.count(0)
    if pattern[:dense] != [0] * dense:
        raise UserError(f"{where}: first_k_dense_replace={leading!r}, but moe_layer_freq begins otherwise")
    if leading != dense:
        raise UserError(f"{where}: first_k_dense_replace={leading!r} must be {dense}, as moe_layer_freq says")
    return told


def _architecture(values: dict[str, Any], where: str) -> str:
    architectures = values.get("architectures") or ["MiMoV2ForCausalLM"]
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(f"{where}: architectures={architectures!r} must be a list of names")
    return architectures[0]


def _is_fused(values: dict[str, Any], where: str) -> bool:
    default = "split" if values.get("model_type") == "mimo_v2_flash" else "fused_qkv"
    layout = values.get("attention_projection_layout") or default
    if layout not in _PROJECTIONS:
        expected = ", ".join(_PROJECTIONS)
        raise UserError(f"{where}: attention_projection_layout={layout!r} must be one of {expected}")
    return _PROJECTIONS[layout]


def _format_name(quantization: dict[str, Any] | None, where: str) -> str:
    if quantization is None:
        return "dense"
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        raise UserError(f"{where}: quantization_config must have quant_method 'fp8', found {quantization!r}")
    if quantization.get("weight_block_size") != [128, 128]:
        raise UserError(
            f"{where}: quantization_config.weight_block_size must be [128, 128], "
            f"found {quantization.get('weight_block_size')!r}"
        )
    if quantization.get("fmt") not in (None, "e4m3"):
        raise UserError(f"{where}: quantization_config.fmt={quantization['fmt']!r} must be 'e4m3'")
    store = quantization.get("store_dtype") or "fp8"
    if store not in ("fp8", "mxfp4"):
        raise UserError(f"{where}: quantization_config.store_dtype={store!r} must be 'fp8' or 'mxfp4'")
    return store


def to_hf(config: ModelConfig, file_format: FileFormat) -> dict[str, Any]:
    """The `config.json` of a model, with the keys that the published files carry."""
    values = MODEL.fill(config) | {
        "architectures": [config.architecture],
        "model_type": "mimo_v2_flash" if config.architecture == "MiMoV2FlashForCausalLM" else "mimo_v2",
        "attention_projection_layout": "fused_qkv" if config.fused_qkv else "split",
        "num_hidden_layers": config.num_layers,
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
        "torch_dtype": file_format.dtype,
    }
    if file_format.router != "float32":
        values["moe_router_dtype"] = file_format.router
    values |= towers_to_hf(config.vision, config.audio, config.media)
    if file_format.of("linear") == "fp8":
        values["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "store_dtype": file_format.name,
            "ignored_layers": [f"model.layers.{layer}.self_attn.o_proj" for layer in range(config.num_layers)]
            + ["model.decoder.self_attn.o_proj"],
        }
    return values
