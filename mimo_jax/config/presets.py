"""Published models and drafters, and the bundled one, by name.

Values: `config.json` of MiMo-V2.5-Pro, MiMo-V2.5 and MiMo-V2-Flash, `dflash/config.json` of MiMo-V2.5-Pro-FP4-DFlash;
of MiMo-V2.6-Pro and V2.6-Flash what is known of theirs: the sizes of V2.5-Pro and V2.5, the towers of V2.5.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.config.model import GLOBAL, MASTERS, PUBLISHED, SLIDING, FileFormat, ModelConfig
from mimo_jax.config.towers import BY_COLUMNS, BY_ROWS, FULL, AudioConfig, MediaConfig, VisionConfig
from mimo_jax.errors import UserError

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
)
_WINDOWS = (FULL, *(BY_ROWS,) * 4, *(BY_COLUMNS,) * 4) * 3 + (FULL,)
_MEDIA = MediaConfig(
    image_token=151_655,
    video_token=151_656,
    audio_token=151_669,
    vision_start=151_652,
    vision_end=151_653,
    video_start=151_670,
    video_end=151_671,
    audio_start=151_673,
    audio_end=151_674,
)


def _with_towers(config: ModelConfig, **changes: Any) -> ModelConfig:
    vision, audio = VisionConfig(config.hidden_size, _WINDOWS), AudioConfig(config.hidden_size)
    return dataclasses.replace(config, vision=vision, audio=audio, media=_MEDIA, **changes)


PRESETS = {
    "mimo-v2.5-pro": _PRO,
    "mimo-v2.5": _with_towers(_V25),
    "mimo-v2.6-pro": _with_towers(_PRO),
    "mimo-v2.6-flash": _with_towers(_V25, norm_eps=1e-6),
    "mimo-v2-flash": dataclasses.replace(
        _V25, rope_theta=5e6, max_position=262_144, fused_qkv=False, architecture="MiMoV2FlashForCausalLM"
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
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    ),
}


# How the published files of each store weights; the bundled one is trained as masters.
FORMATS = {
    "mimo-v2.5-pro": PUBLISHED,
    "mimo-v2.5": FileFormat("fp8"),
    **dict.fromkeys(("mimo-v2.6-pro", "mimo-v2.6-flash"), FileFormat("mxfp4", router="bfloat16")),
    "mimo-v2-flash": FileFormat("fp8"),
    "mimo-tiny": MASTERS,
}


def preset(name: str) -> ModelConfig:
    """The named preset; an unknown name is an error that lists the known ones."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_format(name: str) -> FileFormat:
    """How the files of the named preset store weights."""
    preset(name)
    return FORMATS[name]


# The published drafters, by the preset of their target.
DRAFTER_PRESETS = {
    "mimo-v2.5-pro": DrafterConfig(
        hidden_size=6144,
        intermediate_size=16_384,
        num_layers=5,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
        target_layer_ids=(0, 15, 31, 47, 69),
        num_target_layers=70,
        vocab_size=152_064,
        mask_token_id=151_669,
        window=1024,
        backbone_rotary_base=5e6,
        value_scale=0.612,
    ),
}


def drafter_preset(name: str) -> DrafterConfig:
    """The published drafter of the named preset; where there is none, an error that lists those that exist."""
    if name not in DRAFTER_PRESETS:
        raise UserError(f"drafter: none is published for {name!r}; there is one for {', '.join(DRAFTER_PRESETS)}")
    return DRAFTER_PRESETS[name]
