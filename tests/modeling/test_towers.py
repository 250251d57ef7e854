"""The towers against independent ones: NeMo Automodel's vision, mlx-audio's tokenizer, transformers' Qwen2."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from mimo_jax.config.towers import AudioConfig, AudioTokenizerConfig, VisionConfig
from mimo_jax.modeling.audio import AudioEncoder, grouped, init_audio
from mimo_jax.modeling.audio_tokenizer import AudioTokenizer, code_count, init_audio_tokenizer
from mimo_jax.modeling.vision import VisionTower, init_vision, places_of

WINDOWS = (-1, 0, 0, 1, 1, -1)
VISION = VisionConfig(24, WINDOWS, 32, 48, num_heads=4, num_kv_heads=2, head_dim=16, patch=4, window=6)
AUDIO = AudioConfig(24, channels=5, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, codes=20)
TOKENIZER = AudioTokenizerConfig(
    (16, 16, 8, 8), hidden_size=32, num_layers=5, num_heads=4, intermediate_size=48, window=5, mels=12
)


def put(tree: dict[str, Any], path: list[str], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def drawn(rng: np.random.Generator, tree: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: rng.normal(0, 0.25, leaf.shape).astype(np.float32), tree)


def run(module: Any, tree: dict[str, Any], *inputs: Any) -> np.ndarray:
    return np.asarray(jax.jit(module.apply)({"params": tree}, *inputs))


def randomized(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Its parameters, drawn anew: norms around one, all else around zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, held in module.named_parameters():
            around = 1.0 if "norm" in name or "ln_q" in name else 0.0
            held.copy_(around + 0.2 * torch.randn_like(held))
    return {name: held.detach().numpy() for name, held in module.named_parameters()}


@pytest.fixture(scope="module")
def nemo():
    """NeMo's tower, which adds sinks to the first key; and its weights as our tree."""
    found = importlib.util.find_spec("nemo_automodel")  # whose own imports need far more than this file of it
    if found is None or found.origin is None:
        pytest.skip("nemo-automodel is not installed")
    path = Path(found.origin).parent / "components/models/mimo_v2_flash/vision.py"
    spec = importlib.util.spec_from_file_location("nemo_vision", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    published = {
        **{"depth": len(WINDOWS), "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "hidden_act": "silu"},
        **{"num_key_value_heads": 2, "qk_channels": 16, "in_chans": 3, "patch_size": 4, "temporal_patch_size": 2},
        **{"spatial_merge_size": 2, "fullatt_block_indexes": [0, 5], "vit_window_attn_types": list(WINDOWS)},
        **{"visual_token_window_size": 6, "use_sink": True, "out_hidden_size": 24, "rms_norm_eps": 1e-6},
    }
    tower, tree = module.MiMoVisionTransformer(published, dtype=torch.float32), {}
    for name, leaf in randomized(tower).items():
        parts = name.replace("patch_embed.proj.weight", "patch_embed").replace("merger.mlp.", "merger.mlp_").split(".")
        put(tree, [f"blocks_{parts[1]}", *parts[2:]] if parts[0] == "blocks" else parts, leaf)
    return tower, tree


@pytest.mark.parametrize(("rows", "columns", "frames", "size"), [(6, 10, 2, 60), (6, 10, 2, 256), (2, 2, 1, 4)])
def test_the_vision_tower_is_nemos(nemo, rows, columns, frames, size):
    """Windows by rows and by columns, rotary places, the merger: alike to 1e-4, padded or not."""
    tower, tree = nemo
    patches = np.random.default_rng(0).normal(size=(frames, rows * columns, VISION.patch_values)).astype(np.float32)
    with torch.no_grad():
        grid = torch.tensor([[frames, rows, columns]])
        expected = tower(torch.tensor(patches.reshape(-1, VISION.patch_values)), grid).numpy()
    padded = np.full((frames, size, VISION.patch_values), 9, np.float32)
    padded[:, : rows * columns] = patches
    config = dataclasses.replace(VISION, sink="first key")
    found = run(VisionTower(config), tree, padded, places_of(rows, columns, size, 2))
    np.testing.assert_allclose(found[:, : rows * columns // 4].reshape(-1, 24), expected, atol=1e-4)


def test_sinks_in_the_denominator_are_one_more_term():
    """One block by its equations in float64, patch by patch: a window of 6 each way, exp(sink) added to the sum."""
    config = dataclasses.replace(VISION, windows=(0,), merge=1)
    rng = np.random.default_rng(1)
    tree = drawn(rng, init_vision(config, jax.random.key(0)))
    rows, columns = 3, 7
    patches = rng.normal(size=(1, rows * columns, config.patch_values)).astype(np.float32)
    found = run(VisionTower(config), tree, patches, places_of(rows, columns, rows * columns, 1))

    def affine(x, weights):
        return x @ weights["weight"].T + weights.get("bias", 0)

    def rms(x, weights):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weights["weight"]

    x = patches[0].astype(np.float64) @ tree["patch_embed"].reshape(config.hidden_size, -1).T
    block = tree["blocks_0"]
    split = np.split(affine(rms(x, block["norm1"]), block["attn"]["qkv"]), (64, 96), axis=-1)
    q, k, v = (part.reshape(len(x), -1, 16) for part in split)
    place = np.indices((rows, columns)).reshape(2, -1).T
    angle = np.concatenate([place[:, [axis]] * 10_000.0 ** (-np.arange(4) / 4) for axis in (0, 1)], axis=1)[:, None]

    def turned(x):
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
        )

    q, k, seen = turned(q), turned(k), np.zeros_like(q)
    for i, head in itertools.product(range(len(x)), range(4)):
        near = [j for j in range(len(x)) if abs(i - j) <= 6]
        scores = np.array([q[i, head] @ k[j, head // 2] / 4 for j in near])
        weights = np.exp(scores) / (np.exp(scores).sum() + np.exp(block["attn"]["sinks"][head]))
        seen[i, head] = sum(weight * v[j, head // 2] for weight, j in zip(weights, near))
    x = x + affine(seen.reshape(len(x), -1), block["attn"]["proj"])
    y = rms(x, block["norm2"])
    gate = affine(y, block["mlp"]["gate_proj"])
    x = x + affine(gate / (1 + np.exp(-gate)) * affine(y, block["mlp"]["up_proj"]), block["mlp"]["down_proj"])
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * tree["merger"]["ln_q"]["weight"]
    inner = torch.nn.functional.gelu(torch.tensor(affine(x, tree["merger"]["mlp_0"]))).numpy()
    np.testing.assert_allclose(found[0], affine(inner, tree["merger"]["mlp_2"]), atol=1e-4)


def test_audio_rows_are_qwens():
    """Codes to rows: embeddings added up, transformers' Qwen2 without a mask over each row's frames, projection."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    rotary = {"rope_type": "default", "rope_theta": 640_000.0}
    config = Qwen2Config(
        vocab_size=8, **shape, num_key_value_heads=4, rope_parameters=rotary, attn_implementation="eager"
    )
    qwen = Qwen2Model(config).eval()
    held, rng = randomized(qwen), np.random.default_rng(0)
    tree = drawn(rng, init_audio(AUDIO, jax.random.key(0)))
    for index in range(3):
        layer, names = tree[f"layers_{index}"], {name: f"layers.{index}.{name}" for name in ("self_attn", "mlp")}
        layer["attention_norm"]["weight"] = held[f"layers.{index}.input_layernorm.weight"]
        layer["mlp_norm"]["weight"] = held[f"layers.{index}.post_attention_layernorm.weight"]
        for ours, theirs in (("self_attn", "self_attn"), ("local_mlp", "mlp")):
            for name, part in layer[ours].items():
                layer[ours][name] = {leaf: held[f"{names[theirs]}.{name}.{leaf}"] for leaf in part}
    tree["local_norm"]["weight"] = held["norm.weight"]
    codes = rng.integers(0, 20, (7, 4, 5))
    embedded = sum(tree["speech_embeddings"][channel][codes[:, :, channel]] for channel in range(5))
    with torch.no_grad():
        given = torch.tensor(embedded, dtype=torch.float32)
        read = qwen(inputs_embeds=given, is_causal=False, use_cache=False).last_hidden_state.numpy()
    inner = torch.nn.functional.gelu(torch.tensor(read.reshape(7, -1) @ tree["projection_0"]["weight"].T)).numpy()
    expected = inner @ tree["projection_2"]["weight"].T
    np.testing.assert_allclose(run(AudioEncoder(AUDIO), tree, codes), expected, atol=1e-4)


def test_the_last_frames_of_codes_are_repeated():
    """A row needs four frames: the last one stands in for those that are missing."""
    codes = np.arange(6)[:, None] * np.ones(3, int)
    assert grouped(codes, 4)[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 5, 5]]


@pytest.fixture(scope="module")
def mlx_encoder():
    """mlx-audio's encoder with our hybrid attention, which its layers know and its config does not; and our tree."""
    core = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten

    theirs = pytest.importorskip("mlx_audio.codec.models.mimo_audio_tokenizer.model")
    config = pytest.importorskip("mlx_audio.codec.models.mimo_audio_tokenizer.config")
    sizes = {"d_model": 32, "n_mels": 12, "encoder_layers": 5, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    unused = {"decoder_attention_heads": 4, "vocoder_dim": 32, "vocoder_attention_heads": 4}
    books = {"num_quantizers": 4, "codebook_size": [16, 16, 8, 8]}
    window = {"encoder_causal": True, "encoder_attn_window_size": [5, 0]}
    encoder = theirs.AudioEncoder(config.ModelConfig(**sizes, **unused, **books, **window))
    for layer in encoder.layers[1::2]:
        layer.self_attn.window = [-1, -1]
    rng, tree, weights = np.random.default_rng(0), {}, []
    for name, held in tree_flatten(encoder.parameters()):
        leaf = (float(name.endswith("norm.weight")) + 0.3 * rng.normal(size=held.shape)).astype(np.float32)
        weights.append((name, core.array(leaf)))
        parts = name.replace("layers.", "layers_", 1).split(".") if name.startswith("layers.") else name.split(".")
        if "codebooks" in parts:
            parts = [f"codebook_{parts[2]}"]
        if parts[0] == "down_sample_layer":
            parts = [parts[0], parts[-1]]
        put(tree, parts, leaf.transpose(0, 2, 1) if leaf.ndim == 3 else leaf)
    encoder.load_weights(weights)
    return encoder, core, tree


@pytest.mark.parametrize("frames", [4, 5, 6, 7, 33, 150, 301])
def test_codes_are_mlx_audios(mlx_encoder, frames):
    """All equal, at lengths that halve evenly and that do not; what lies behind the segment changes none."""
    encoder, core, tree = mlx_encoder
    mel = np.random.default_rng(frames).normal(size=(frames, 12)).astype(np.float32)
    features = encoder(core.array(mel)[None], length=frames)[0]
    expected = np.array(encoder.quantizer.encode(features, None)).T
    padded = np.full((320, 12), 99, np.float32)
    padded[:frames] = mel
    found = run(AudioTokenizer(TOKENIZER), tree, padded, np.array(frames, np.int32))
    assert code_count(frames) == len(expected)
    np.testing.assert_array_equal(found[: len(expected)], expected)


def test_codes_of_a_beginning_begin_the_codes():
    """Nothing looks ahead but the convolutions: all but the last codes of a shorter clip are the longer one's."""
    rng = np.random.default_rng(2)
    tree = init_audio_tokenizer(TOKENIZER, jax.random.key(0))
    mel = rng.normal(size=(256, 12)).astype(np.float32)
    whole, part = (run(AudioTokenizer(TOKENIZER), tree, mel, np.array(count, np.int32)) for count in (256, 160))
    np.testing.assert_array_equal(part[:39], whole[:39])
