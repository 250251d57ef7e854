"""`DrafterConfig` from and to the published `dflash/config.json`: one table of keys, and the values understood."""

from __future__ import annotations

import re
from typing import Any

from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.errors import UserError

_NESTED = "dflash_config"
# HF key -> field. Every key is required unless it appears in _OPTIONAL_KEYS.
_KEYS = {
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
    "dflash_config.bias_rank": "bias_rank",
    "dflash_config.lookup": "lookup",
    "dflash_config.acceptance_length": "acceptance_length",
}
_OPTIONAL_KEYS = {"max_position_embeddings", "initializer_range", "dflash_config.backbone_rotary_base"}
# Not in published files: written only where they say something.
_OWN_KEYS: dict[str, Any] = {
    "dflash_config.rotary_base": "drafter",
    "dflash_config.bias_rank": 0,
    "dflash_config.lookup": 0,
    "dflash_config.acceptance_length": None,
}
# Keys whose other values would need mathematics this package does not have; None: the key may be absent.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3", None),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "rope_scaling": (None,),
    "is_causal": (False, None),
    "dflash_config.use_swa": (True,),
}
# Where both are given, they must agree.
_EQUAL_KEYS = {
    "v_head_dim": "head_dim",
    "target_hidden_size": "hidden_size",
    "sliding_window": "dflash_config.swa_window_size",
    "add_swa_attention_sink_bias": "dflash_config.attention_sink_bias",
}
_MAX_VALUE_TEXT = 1000


def drafter_from_hf(values: dict[str, Any], where: str = "config.json") -> DrafterConfig:
    """Parses a drafter's HF config. Missing keys, and values it cannot have, are errors naming key, value and rule."""
    if not isinstance(values.get(_NESTED), dict):
        raise UserError(f"{where}: {_NESTED} must be a table; without it this is not the config of a DFlash drafter")
    found = {key: _lookup(values, key, where) for key in (*_KEYS, *_REQUIRED_VALUES, *_EQUAL_KEYS)}
    for key, allowed in _REQUIRED_VALUES.items():
        if found[key] not in allowed:
            raise UserError(f"{where}: {key}={found[key]!r} is not supported; expected {allowed[0]!r}")
    missing = [key for key in _KEYS if found[key] is None and key not in _OPTIONAL_KEYS | set(_OWN_KEYS)]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    for key, other in _EQUAL_KEYS.items():
        if found[key] is not None and found[key] != found[other]:
            raise UserError(f"{where}: {key}={found[key]!r} must equal {other}={found[other]!r}")
    for key, kind in (("dflash_config.target_layer_ids", list), ("dflash_config.rotary_base", str | None)):
        if not isinstance(found[key], kind):
            raise UserError(f"{where}: {key}={found[key]!r} must be a {'list' if kind is list else 'string'}")
    fields = {field: found[key] for key, field in _KEYS.items() if found[key] is not None}
    try:
        return DrafterConfig(**fields | {"target_layer_ids": tuple(fields["target_layer_ids"])})
    except UserError as error:
        raise UserError(f"{where}: {_with_hf_keys(str(error))}") from None


def _lookup(values: dict[str, Any], key: str, where: str) -> Any:
    table, name = (values[_NESTED], key.removeprefix(f"{_NESTED}.")) if "." in key else (values, key)
    value = table.get(name)
    try:
        short = len(repr(value)) <= _MAX_VALUE_TEXT  # so that an error can quote it
    except (ValueError, RecursionError):
        short = False
    if not short:
        raise UserError(f"{where}: {key} takes more than {_MAX_VALUE_TEXT} characters; no such value is sensible")
    return value


def _with_hf_keys(message: str) -> str:
    """An error about a field, in the words of the file."""
    key_of = {field: key for key, field in _KEYS.items()}
    words = re.sub(r"\w+", lambda word: key_of.get(word[0], word[0]), message)
    return words.removeprefix("drafter: ")


def drafter_to_hf(config: DrafterConfig) -> dict[str, Any]:
    """The HF `config.json` of `config`, with the keys that the published files carry."""
    values: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "v_head_dim": config.head_dim,
        "sliding_window": config.window,
        "torch_dtype": config.param_dtype,
    }
    nested: dict[str, Any] = {"use_swa": True}
    for key, field in _KEYS.items():
        value = getattr(config, field)
        if value is not None and (key not in _OWN_KEYS or value != _OWN_KEYS[key]):
            table = nested if key.startswith(_NESTED) else values
            table[key.removeprefix(f"{_NESTED}.")] = list(value) if isinstance(value, tuple) else value
    return values | {_NESTED: nested}
