"""The published `dflash/config.json` of a drafter, and the one of its extras, to and from our config."""

from __future__ import annotations

import dataclasses
from typing import Any

from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.config.schema import Schema
from mimo_jax.errors import UserError

_NESTED = "dflash_config"
DRAFTER = Schema(
    name="drafter",
    keys={
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "partial_rotary_factor": "partial_rotary_factor",
        "block_size": "block_size",
        "num_target_layers": "num_target_layers",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position",
        "rope_theta": "rope_theta",
        "rms_norm_eps": "norm_eps",
        "initializer_range": "init_range",
        "dflash_config.target_layer_ids": "target_layer_ids",
        "dflash_config.mask_token_id": "mask_token_id",
        "dflash_config.swa_window_size": "window",
        "dflash_config.backbone_rotary_base": "backbone_rotary_base",
        "dflash_config.attention_value_scale": "value_scale",
        "dflash_config.attention_sink_bias": "has_sink",
        "dflash_config.rotary_base": "rotary_base",
        "dflash_config.acceptance_length": "acceptance_length",
    },
    optional=frozenset(
        {
            "max_position_embeddings",
            "initializer_range",
            "dflash_config.backbone_rotary_base",
            "dflash_config.rotary_base",
            "dflash_config.acceptance_length",
        }
    ),
    required={
        "model_type": ("qwen3",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
        "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
        "is_causal": (False,),
        "dflash_config.use_swa": (True,),
    },
    equal={
        "v_head_dim": "head_dim",
        "target_hidden_size": "hidden_size",
        "sliding_window": "dflash_config.swa_window_size",
        "add_swa_attention_sink_bias": "dflash_config.attention_sink_bias",
    },
    own={
        "dflash_config.backbone_rotary_base": None,
        "dflash_config.rotary_base": "drafter",
        "dflash_config.acceptance_length": None,
    },
)
EXTRAS = Schema(
    name="drafter",
    keys={"bias_rank": "bias_rank", "lookup": "lookup", "acceptance_length": "acceptance_length"},
    optional=frozenset({"bias_rank", "lookup", "acceptance_length"}),
    required={},
    equal={},
    own={"bias_rank": 0, "lookup": 0, "acceptance_length": None},
)


def drafter_from_hf(values: dict[str, Any], where: str = "config.json") -> DrafterConfig:
    """A drafter's config."""
    if not isinstance(values.get(_NESTED), dict):
        raise UserError(f"{where}: {_NESTED} must be a table; without it this is not the config of a DFlash drafter")
    if values[_NESTED].get("use_swa") is None:
        raise UserError(f"{where}: {_NESTED}.use_swa=None is not supported; expected True")
    fields = DRAFTER.find(values, where)
    for field, kind, word in (("target_layer_ids", list, "list"), ("rotary_base", str, "string")):
        if not isinstance(fields.get(field, kind()), kind):
            raise UserError(f"{where}: {_NESTED}.{field}={fields[field]!r} must be a {word}")
    try:
        return DrafterConfig(**fields | {"target_layer_ids": tuple(fields["target_layer_ids"])})
    except UserError as error:
        raise DRAFTER.in_words_of_the_file(error, where) from None


def with_extras(config: DrafterConfig, values: dict[str, Any], where: str = "config.json") -> DrafterConfig:
    """A published drafter's config with what the config of its extras adds."""
    fields: dict[str, Any] = {"acceptance_length": None, **EXTRAS.find(values, where)}
    try:
        return dataclasses.replace(config, **fields, published_acceptance_length=config.acceptance_length)
    except UserError as error:
        raise EXTRAS.in_words_of_the_file(error, where) from None


def extras_of(config: DrafterConfig) -> dict[str, Any]:
    """The `config.json` of a drafter's extras."""
    return EXTRAS.fill(config)


def drafter_to_hf(config: DrafterConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a drafter whose weights are stored as `dtype`, with the published keys; no extras."""
    values = DRAFTER.fill(config.published)
    nested = {"use_swa": True, **values.pop(_NESTED)}
    return {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "v_head_dim": config.head_dim,
        "sliding_window": config.window,
        "torch_dtype": dtype,
        **values,
        _NESTED: nested,
    }
