"""Rows of the towers in front of the text model, and of the audio tokenizer; see `weights.params`.

Their axes have names of their own: every device holds a tower whole. No path ends as one of the text model's.
"""

from __future__ import annotations

from collections.abc import Iterator

from mimo_jax.config.towers import FULL, AudioConfig, AudioTokenizerConfig, VisionConfig
from mimo_jax.weights.row import Row, norm

# Rows, the sizes of their axes, and what precedes their paths and their names.
Rows = tuple[tuple[Row, ...], dict[str, int], str, str]
# The parts of a parameter tree that hold towers, and how the names of their tensors begin.
TOWERS = {"vision": ("visual.",), "audio": ("audio_encoder.", "speech_embeddings.")}


def _affine(path: str, name: str, outputs: str, inputs: str, has_bias: bool = True) -> tuple[Row, ...]:
    weight = Row(f"{path}/weight", f"{name}.weight", f"{outputs} {inputs}", optimizer="muon")
    return (weight, *((Row(f"{path}/bias", f"{name}.bias", outputs),) if has_bias else ()))


def _layer_norm(name: str, axes: str) -> tuple[Row, ...]:
    return norm(name, name, axes), Row(f"{name}/bias", f"{name}.bias", axes)


_VISION = (Row("patch_embed", "patch_embed.proj.weight", "seen channels frames patch_rows patch_columns"),)
_VISION_BLOCK = (
    norm("norm1", "norm1", "seen"),
    norm("norm2", "norm2", "seen"),
    *_affine("attn/qkv", "attn.qkv", "seen_qkv", "seen"),
    *_affine("attn/proj", "attn.proj", "seen", "seen_heads_outputs"),
    *_affine("mlp/gate_proj", "mlp.gate_proj", "seen_features", "seen"),
    *_affine("mlp/up_proj", "mlp.up_proj", "seen_features", "seen"),
    *_affine("mlp/down_proj", "mlp.down_proj", "seen", "seen_features"),
)
_VISION_SINK = (Row("attn/sinks", "attn.sinks", "seen_heads"),)
_MERGER = (
    norm("merger/ln_q", "merger.ln_q", "seen"),
    *_affine("merger/mlp_0", "merger.mlp.0", "merged", "merged_inputs", has_bias=False),
    *_affine("merger/mlp_2", "merger.mlp.2", "out", "merged", has_bias=False),
)
_SPEECH = (Row("speech_embeddings", "speech_embeddings.{index}.weight", "code_channels codes heard"),)
_AUDIO_LAYER = (
    norm("attention_norm", "input_layernorm", "heard"),
    norm("mlp_norm", "post_attention_layernorm", "heard"),
    *(row for name in "qkv" for row in _affine(f"self_attn/{name}_proj", f"self_attn.{name}_proj", "heard", "heard")),
    *_affine("self_attn/o_proj", "self_attn.o_proj", "heard", "heard", has_bias=False),
    *_affine("local_mlp/gate_proj", "mlp.gate_proj", "heard_features", "heard", has_bias=False),
    *_affine("local_mlp/up_proj", "mlp.up_proj", "heard_features", "heard", has_bias=False),
    *_affine("local_mlp/down_proj", "mlp.down_proj", "heard", "heard_features", has_bias=False),
)
_AUDIO = (
    norm("local_norm", "input_local_transformer.norm", "heard"),
    *_affine("projection_0", "projection.mlp.0", "projected", "grouped", has_bias=False),
    *_affine("projection_2", "projection.mlp.2", "out", "projected", has_bias=False),
)
_CONVOLUTIONS = (
    Row("conv1/weight", "conv1.weight", "heard mels conv_places"),
    Row("conv1/bias", "conv1.bias", "heard"),
    Row("conv2/weight", "conv2.weight", "heard heard conv_places"),
    Row("conv2/bias", "conv2.bias", "heard"),
)
_TOKENIZER_LAYER = (
    *_affine("self_attn/q_proj", "self_attn.q_proj", "heard", "heard"),
    *_affine("self_attn/k_proj", "self_attn.k_proj", "heard", "heard", has_bias=False),
    *_affine("self_attn/v_proj", "self_attn.v_proj", "heard", "heard"),
    *_affine("self_attn/out_proj", "self_attn.out_proj", "heard", "heard"),
    *_layer_norm("self_attn_layer_norm", "heard"),
    *_layer_norm("final_layer_norm", "heard"),
    *_affine("fc1", "fc1", "heard_features", "heard"),
    *_affine("fc2", "fc2", "heard", "heard_features"),
)
_TOKENIZER_END = (
    *_layer_norm("layer_norm", "heard"),
    *_layer_norm("down_sample_norm", "heard"),
    Row("down_sample_layer/weight", "down_sample_layer.0.weight", "heard heard halving"),
)
TOWER_ROWS = (
    *(_VISION + _VISION_BLOCK + _VISION_SINK + _MERGER),
    *(_SPEECH + _AUDIO_LAYER + _AUDIO),
    *(_CONVOLUTIONS + _TOKENIZER_LAYER + _TOKENIZER_END),
)


def rows_of_towers(vision: VisionConfig | None, audio: AudioConfig | None) -> Iterator[Rows]:
    """Those of the towers that a model has, in file order."""
    if vision is not None:
        yield from _rows_of_vision(vision)
    if audio is not None:
        yield from _rows_of_audio(audio)


def _rows_of_vision(config: VisionConfig) -> Iterator[Rows]:
    heads = config.num_heads * config.head_dim
    sizes = {
        "seen": config.hidden_size,
        "channels": config.channels,
        "frames": config.temporal_patch,
        "patch_rows": config.patch,
        "patch_columns": config.patch,
        "seen_qkv": heads + 2 * config.num_kv_heads * config.head_dim,
        "seen_heads_outputs": heads,
        "seen_heads": config.num_heads,
        "seen_features": config.intermediate_size,
        "merged": config.merged_size,
        "merged_inputs": config.merged_size,
        "out": config.out_size,
    }
    yield _VISION, sizes, "vision/", "visual."
    for index, kind in enumerate(config.windows):
        rows = _VISION_BLOCK + (_VISION_SINK if config.has_sink and kind != FULL else ())
        yield rows, sizes, f"vision/blocks_{index}/", f"visual.blocks.{index}."
    yield _MERGER, sizes, "vision/", "visual."


def _rows_of_audio(config: AudioConfig) -> Iterator[Rows]:
    sizes = {
        "heard": config.hidden_size,
        "heard_features": config.intermediate_size,
        "code_channels": config.channels,
        "codes": config.codes,
        "grouped": config.group_size,
        "projected": config.projection_ratio * config.group_size,
        "out": config.out_size,
    }
    for index in range(config.num_layers):
        yield _AUDIO_LAYER, sizes, f"audio/layers_{index}/", f"audio_encoder.input_local_transformer.layers.{index}."
    yield _AUDIO, sizes, "audio/", "audio_encoder."
    yield _SPEECH, sizes, "audio/", ""


def rows_of_tokenizer(config: AudioTokenizerConfig) -> Iterator[Rows]:
    """In file order."""
    sizes = {
        "heard": config.hidden_size,
        "heard_features": config.intermediate_size,
        "mels": config.mels,
        "conv_places": 3,
        "halving": 2,
    }
    yield _CONVOLUTIONS, sizes, "", "encoder."
    for index in range(config.num_layers):
        yield _TOKENIZER_LAYER, sizes, f"layers_{index}/", f"encoder.layers.{index}."
    yield _TOKENIZER_END, sizes, "", "encoder."
    for index, size in enumerate(config.codebooks):
        name = f"encoder.quantizer.vq.layers.{index}._codebook.embed"
        yield (Row(f"codebook_{index}", name, "entries heard", "float32"),), sizes | {"entries": size}, "", ""
