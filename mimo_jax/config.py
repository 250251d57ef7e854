"""The model's description: one frozen, validated dataclass, read from and written to a HF `config.json`.

Published values: MiMo-V2.5-Pro, MiMo-V2.5 (text part) and MiMo-V2-Flash `config.json`.
Axis letters used throughout the package are listed in `mimo_jax/glossary.md`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from mimo_jax.errors import UserError

GLOBAL, SLIDING = 0, 1

# Where each storage keeps its weights: format of the fused/dense linears, format of the routed experts.
STORAGE_FORMATS = {
    "dense": ("dense", "dense"),  # plain arrays of `param_dtype`: training, bf16 checkpoints
    "fp8": ("fp8", "fp8"),  # the published FP8 checkpoints
    "mxfp4": ("fp8", "mxfp4"),  # the published FP4-DFlash checkpoint
    "unpacked": ("dense", "unpacked"),  # one array per expert, never sliced: fastest under XLA on CPU
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Geometry and numerics of a MiMo-V2 text model. Sizes are element counts; see the glossary for the letters."""

    vocab_size: int  # C
    hidden_size: int  # D
    layer_pattern: tuple[int, ...]  # per layer: 0 global, 1 sliding
    moe_pattern: tuple[int, ...]  # per layer: 0 dense FFN, 1 routed experts
    num_heads: int  # H
    num_kv_heads: int  # K on global layers
    sliding_num_kv_heads: int  # K on sliding layers
    head_dim: int  # Q
    v_head_dim: int  # V
    intermediate_size: int  # F of dense layers
    moe_intermediate_size: int  # F of one expert
    num_experts: int  # E
    experts_per_token: int  # X
    rope_theta: float
    sliding_rope_theta: float
    sliding_window: int  # keys visible from a sliding layer, the query's own included
    partial_rotary_factor: float = 0.334
    value_scale: float = 1.0
    sink_on_sliding: bool = True
    sink_on_global: bool = False
    norm_eps: float = 1e-5
    max_position: int = 1_048_576
    mtp_layers: int = 0
    qkv_layout: str = "fused_qkv"  # or "split": how the projection is stored
    storage: str = "dense"
    dtype: str = "bfloat16"  # of activations
    param_dtype: str = "bfloat16"  # of weights that are neither quantised nor the router's
    init_range: float = 0.02
    architecture: str = "MiMoV2ForCausalLM"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in _POSITIVE_FIELDS:
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 2**40:
                raise UserError(f"config: {field}={value!r} must be a positive number")
        for field in _INTEGER_FIELDS:
            if type(getattr(self, field)) is not int:
                raise UserError(f"config: {field}={getattr(self, field)!r} must be an integer")
        if self.mtp_layers < 0:
            raise UserError(f"config: mtp_layers={self.mtp_layers} must not be negative")
        for field in ("sink_on_sliding", "sink_on_global"):
            if not isinstance(getattr(self, field), bool):
                raise UserError(f"config: {field}={getattr(self, field)!r} must be true or false")
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or not 0 <= value < self.vocab_size):
                raise UserError(f"config: {field}={value!r} must be a token id below vocab_size={self.vocab_size}")
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise UserError(f"config: {field}={getattr(self, field)!r} must be one of {', '.join(choices)}")
        for field in ("layer_pattern", "moe_pattern"):
            if not all(entry in (0, 1) for entry in getattr(self, field)):
                raise UserError(f"config: {field}={getattr(self, field)} may hold only 0 and 1")
        if len(self.layer_pattern) != len(self.moe_pattern) or not self.layer_pattern:
            raise UserError(
                f"config: layer_pattern has {len(self.layer_pattern)} entries, moe_pattern {len(self.moe_pattern)}; "
                "both need one per layer"
            )
        for field in ("num_kv_heads", "sliding_num_kv_heads"):
            self._require_multiple("num_heads", field)
        self._require_multiple("sliding_num_kv_heads", "num_kv_heads")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"config: experts_per_token={self.experts_per_token} must lie in 1..num_experts={self.num_experts}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"config: head_dim={self.head_dim} x partial_rotary_factor={self.partial_rotary_factor} gives "
                f"{self.rotary_dim} rotary dimensions; an even number within head_dim is needed"
            )
        for field in ("hidden_size", "moe_intermediate_size"):
            if self.expert_format == "mxfp4" and getattr(self, field) % 32:
                raise UserError(f"config: {field}={getattr(self, field)} must be a multiple of the MXFP4 block, 32")
        if self.storage == "unpacked" and not any(self.moe_pattern):
            raise UserError("config: storage='unpacked' needs at least one layer of experts")

    def _require_multiple(self, field: str, divisor_field: str) -> None:
        value, divisor = getattr(self, field), getattr(self, divisor_field)
        if value % divisor:
            raise UserError(f"config: {field}={value} must be a multiple of {divisor_field}={divisor}")

    @property
    def num_layers(self) -> int:
        return len(self.layer_pattern)

    @property
    def rotary_dim(self) -> int:
        """Truncated, not rounded: int(192 * 0.334) = 64."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def qkv_chunks(self) -> int:
        """Chunks of the fused projection: the tensor-parallel degree it was quantised for (8 for Pro, 4 for V2.5)."""
        return self.num_kv_heads

    @property
    def linear_format(self) -> str:
        return STORAGE_FORMATS[self.storage][0]

    @property
    def expert_format(self) -> str:
        return STORAGE_FORMATS[self.storage][1]

    def kv_heads(self, kind: int) -> int:
        """Key/value heads of a layer of `kind` (GLOBAL or SLIDING)."""
        return self.sliding_num_kv_heads if kind == SLIDING else self.num_kv_heads

    def has_sink(self, kind: int) -> bool:
        return self.sink_on_sliding if kind == SLIDING else self.sink_on_global

    def theta(self, kind: int) -> float:
        return self.sliding_rope_theta if kind == SLIDING else self.rope_theta


_INTEGER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "sliding_num_kv_heads",
    "head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "experts_per_token",
    "sliding_window",
    "max_position",
    "mtp_layers",
)
_POSITIVE_FIELDS = (
    *(field for field in _INTEGER_FIELDS if field != "mtp_layers"),
    "rope_theta",
    "sliding_rope_theta",
    "partial_rotary_factor",
    "value_scale",
    "norm_eps",
    "init_range",
)
_CHOICES = {
    "qkv_layout": ("fused_qkv", "split"),
    "storage": tuple(STORAGE_FORMATS),
    "dtype": ("bfloat16", "float32"),
    "param_dtype": ("bfloat16", "float32"),
    "architecture": ("MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM"),
}

_PRO_GLOBAL_LAYERS = (0, 7, 15, 23, 31, 39, 47, 55, 62, 69)
_V25_GLOBAL_LAYERS = (0, 5, 11, 17, 23, 29, 35, 41, 47)


def _pattern(num_layers: int, global_layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(GLOBAL if layer in global_layers else SLIDING for layer in range(num_layers))


_PRO = ModelConfig(
    vocab_size=152_576,
    hidden_size=6144,
    layer_pattern=_pattern(70, _PRO_GLOBAL_LAYERS),
    moe_pattern=(0,) + (1,) * 69,
    num_heads=128,
    num_kv_heads=8,
    sliding_num_kv_heads=8,
    head_dim=192,
    v_head_dim=128,
    intermediate_size=16_384,
    moe_intermediate_size=2048,
    num_experts=384,
    experts_per_token=8,
    rope_theta=1e7,
    sliding_rope_theta=1e4,
    sliding_window=128,
    value_scale=0.612,
    mtp_layers=3,
    storage="mxfp4",
    bos_token_id=151_643,
    eos_token_id=151_645,
    pad_token_id=151_643,
)
_V25 = dataclasses.replace(
    _PRO,
    hidden_size=4096,
    layer_pattern=_pattern(48, _V25_GLOBAL_LAYERS),
    moe_pattern=(0,) + (1,) * 47,
    num_heads=64,
    num_kv_heads=4,
    num_experts=256,
    value_scale=0.707,
    storage="fp8",
)
PRESETS = {
    "mimo-v2.5-pro": _PRO,
    "mimo-v2.5": _V25,
    "mimo-v2-flash": dataclasses.replace(
        _V25, rope_theta=5e6, max_position=262_144, qkv_layout="split", architecture="MiMoV2FlashForCausalLM"
    ),
    # The bundled model. Every size divides by 8 devices; 96 QKV rows per chunk keep the padded scale grid in play.
    "mimo-tiny": dataclasses.replace(
        _PRO,
        vocab_size=4096,
        hidden_size=192,
        layer_pattern=(0, 1, 1, 0, 1, 1),
        moe_pattern=(0, 1, 1, 1, 1, 1),
        num_heads=8,
        head_dim=36,
        v_head_dim=24,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_experts=16,
        experts_per_token=2,
        rope_theta=1e4,
        sliding_window=64,
        max_position=1024,
        mtp_layers=1,
        storage="dense",
        param_dtype="float32",
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    ),
}


def preset(name: str) -> ModelConfig:
    """The named preset; an unknown name is an error that lists the known ones."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    return PRESETS[name]


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


def read_config(path: str | Path) -> ModelConfig:
    """Reads `config.json` at `path`; an unreadable or invalid file is a one-line error."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return from_hf(values, str(path))
