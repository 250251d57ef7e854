"""The parts of a published `config.json` that describe towers and media, to and from our configs."""

from __future__ import annotations

from typing import Any

from mimo_jax.config.schema import Schema
from mimo_jax.config.towers import AudioConfig, AudioTokenizerConfig, MediaConfig, VisionConfig
from mimo_jax.errors import UserError

VISION = Schema(
    name="vision",
    keys={
        "out_hidden_size": "out_size",
        "vit_window_attn_types": "windows",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "qk_channels": "head_dim",
        "in_chans": "channels",
        "patch_size": "patch",
        "temporal_patch_size": "temporal_patch",
        "spatial_merge_size": "merge",
        "visual_token_window_size": "window",
        "use_sink": "has_sink",
        "rms_norm_eps": "norm_eps",
    },
    optional=frozenset({"qk_channels", "rms_norm_eps", "use_sink", "in_chans"}),
    required={"hidden_act": ("silu",)},
    equal={"spatial_patch_size": "patch_size", "in_channels": "in_chans"},
)
AUDIO = Schema(
    name="audio",
    keys={
        "out_hidden_size": "out_size",
        "audio_channels": "channels",
        "group_size": "group",
        "audio_segment_size": "segment",
        "input_local_dim": "hidden_size",
        "input_local_layers": "num_layers",
        "input_local_attn_heads": "num_heads",
        "input_local_intermediate_size": "intermediate_size",
        "rope_theta": "rope_theta",
    },
    optional=frozenset({"rope_theta"}),
    required={
        "input_full_attention": (True,),
        "add_post_norm": (True,),
        "partial_rotary_factor": (1.0,),
        "projection_layers": (2,),
    },
    equal={},
)
TOKENIZER = Schema(
    name="audio tokenizer",
    keys={
        "codebook_size": "codebooks",
        "d_model": "hidden_size",
        "encoder_layers": "num_layers",
        "encoder_attention_heads": "num_heads",
        "encoder_ffn_dim": "intermediate_size",
        "encoder_skip_layer_id": "skip_layer",
        "swa_per_block": "window_every",
        "n_mels": "mels",
        "sampling_rate": "sample_rate",
        "window_size": "window_samples",
        "hop_length": "hop",
        "rope_theta": "rope_theta",
    },
    optional=frozenset({"rope_theta"}),
    required={
        "encoder_causal": (True,),
        "hybrid_attention": (True,),
        "kernel_size": (3,),
        "stride_size": (2,),
        "avg_pooler": (2,),
        "fmin": (0,),
        "fmax": (None,),
        "ln_type": ("LayerNorm",),
        "activation_function": ("gelu",),
        "rope_type": ("default",),
    },
    equal={"nfft": "window_size"},
)
# Of `processor_config`; ids of some tokens also stand at the top.
_LIMITS = {
    "image_min_pixels": "image_min_pixels",
    "image_max_pixels": "image_max_pixels",
    "video_min_pixels": "video_min_pixels",
    "video_max_pixels": "video_max_pixels",
    "video_total_max_pixels": "video_total_pixels",
    "fps": "fps",
    "max_frames": "max_frames",
}
_TOKENS = {
    "image_token_id": "image_token",
    "video_token_id": "video_token",
    "audio_token_id": "audio_token",
    "vision_start_token_id": "vision_start",
    "vision_end_token_id": "vision_end",
    "video_start_token_id": "video_start",
    "video_end_token_id": "video_end",
    "audio_start_token_id": "audio_start",
    "audio_end_token_id": "audio_end",
}


def towers_from_hf(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields `vision`, `audio` and `media` of a model's config, those that it has."""
    found: dict[str, Any] = {}
    if (table := _table(values, "vision_config", where)) is not None:
        found["vision"] = _vision_of(table, f"{where}: vision_config")
    if (table := _table(values, "audio_config", where)) is not None:
        found["audio"] = _audio_of(table, f"{where}: audio_config")
    if found:
        found["media"] = _media_of(values, _table(values, "processor_config", where) or {}, where)
    return found


def _table(values: dict[str, Any], key: str, where: str) -> dict[str, Any] | None:
    table = values.get(key)
    if table is not None and not isinstance(table, dict):
        raise UserError(f"{where}: {key}={table!r} must be a table")
    return table


def _vision_of(values: dict[str, Any], where: str) -> VisionConfig:
    fields = VISION.find(values, where)
    windows = fields["windows"]
    if not isinstance(windows, list):
        raise UserError(f"{where}: vit_window_attn_types={windows!r} must be a list with one entry per block")
    config = _made(VISION, VisionConfig, fields | {"windows": tuple(windows)}, where)
    for key, expected in (("depth", config.depth), ("fullatt_block_indexes", config.full_blocks)):
        if values.get(key) not in (None, expected):
            raise UserError(f"{where}: {key}={values[key]!r}, but vit_window_attn_types says {expected}")
    return config


def _audio_of(values: dict[str, Any], where: str) -> AudioConfig:
    fields = AUDIO.find(values, where)
    sizes = {_whole(size) for size in str(values.get("speech_vocab_size")).split("-")}
    if len(sizes) != 1 or None in sizes:
        raise UserError(f"{where}: speech_vocab_size={values.get('speech_vocab_size')!r} must be one size for all")
    heads = values.get("input_local_head_dim")
    if heads not in (None, fields["hidden_size"] // fields["num_heads"]):
        raise UserError(f"{where}: input_local_head_dim={heads!r} must be input_local_dim / input_local_attn_heads")
    return _made(AUDIO, AudioConfig, fields | {"codes": sizes.pop()}, where)


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else None


def _media_of(values: dict[str, Any], processor: dict[str, Any], where: str) -> MediaConfig:
    fields = {}
    for key, field in _TOKENS.items():
        given = [table[key] for table in (values, processor) if table.get(key) is not None]
        if not given or given != given[:1] * len(given):
            raise UserError(f"{where}: {key}={given} must be given, and alike wherever it is")
        fields[field] = given[0]
    limits = {field: processor[key] for key, field in _LIMITS.items() if processor.get(key) is not None}
    try:
        return MediaConfig(**fields, **limits)
    except UserError as error:
        raise UserError(f"{where}: processor_config: {error}") from None


def tokenizer_from_hf(values: dict[str, Any], where: str) -> AudioTokenizerConfig:
    """The config of the folder `audio_tokenizer/`."""
    fields = TOKENIZER.find(values, where)
    reach = values.get("encoder_attn_window_size")
    if not isinstance(reach, list) or len(reach) != 2 or reach[1] != 0:
        raise UserError(f"{where}: encoder_attn_window_size={reach!r} must be a number of places before, and 0")
    if not isinstance(fields["codebooks"], list):
        raise UserError(f"{where}: codebook_size={fields['codebooks']!r} must be a list")
    fields |= {"codebooks": tuple(fields["codebooks"]), "window": reach[0]}
    return _made(TOKENIZER, AudioTokenizerConfig, fields, where)


def _made(schema: Schema, kind: Any, fields: dict[str, Any], where: str) -> Any:
    try:
        return kind(**fields)
    except UserError as error:
        raise schema.in_words_of_the_file(error, where) from None


def towers_to_hf(vision: VisionConfig | None, audio: AudioConfig | None, media: MediaConfig | None) -> dict[str, Any]:
    """The keys of a `config.json` that `towers_from_hf` reads."""
    values: dict[str, Any] = {}
    if vision is not None:
        values["vision_config"] = _written(VISION, vision) | {
            "depth": vision.depth,
            "spatial_patch_size": vision.patch,
            "num_query_groups": vision.num_heads // vision.num_kv_heads,
            "fullatt_block_indexes": vision.full_blocks,
        }
    if audio is not None:
        values["audio_config"] = _written(AUDIO, audio) | {
            "input_local_head_dim": audio.hidden_size // audio.num_heads,
            "speech_vocab_size": str(audio.codes),
        }
    if media is not None:
        values |= {key: getattr(media, field) for key, field in _TOKENS.items()}
        values["processor_config"] = {key: getattr(media, field) for key, field in _LIMITS.items()}
    return values


def tokenizer_to_hf(config: AudioTokenizerConfig) -> dict[str, Any]:
    """The `config.json` of an audio tokenizer."""
    reach = [config.window, 0]
    return _written(TOKENIZER, config) | {"nfft": config.window_samples, "encoder_attn_window_size": reach}


def _written(schema: Schema, config: Any) -> dict[str, Any]:
    """The keys of a config, and those that the schema allows one value of."""
    return schema.fill(config) | {key: allowed[0] for key, allowed in schema.required.items()}
