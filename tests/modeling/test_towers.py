"""The towers against independent ones: NeMo Automodel's vision, mlx-audio's tokenizer, transformers' Qwen2."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest
import torch

from mimo_jax.config.towers import AudioConfig, AudioTokenizerConfig, VisionConfig
from mimo_jax.modeling.audio import AudioEncoder, grouped
from mimo_jax.modeling.audio_tokenizer import AudioTokenizer, code_count, init_audio_tokenizer
from mimo_jax.modeling.vision import VisionTower, init_vision, places_of
from tests.modeling.tower_oracles import Mlx, Nemo, Qwen, drawn

WINDOWS = (-1, 0, 0, 1, 1, -1)
VISION = VisionConfig(24, WINDOWS, 32, 48, num_heads=4, num_kv_heads=2, head_dim=16, patch=4, window=6)
AUDIO = AudioConfig(24, channels=5, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, codes=20)
TOKENIZER = AudioTokenizerConfig(
    (16, 16, 8, 8), hidden_size=32, num_layers=5, num_heads=4, intermediate_size=48, window=5, mels=12
)


def run(module: Any, tree: dict[str, Any], *inputs: Any) -> np.ndarray:
    return np.asarray(jax.jit(module.apply)({"params": tree}, *inputs))


@pytest.fixture(scope="module")
def nemo() -> Nemo:
    return Nemo(VISION)


@pytest.mark.parametrize(("rows", "columns", "frames", "size"), [(6, 10, 2, 60), (6, 10, 2, 256), (2, 2, 1, 4)])
def test_the_vision_tower_is_nemos(nemo, rows, columns, frames, size):
    """Windows by rows and by columns, rotary places, the merger: alike to 1e-4, padded or not."""
    patches = np.random.default_rng(0).normal(size=(frames, rows * columns, VISION.patch_values)).astype(np.float32)
    expected = nemo.rows(patches, rows, columns)
    padded = np.full((frames, size, VISION.patch_values), 9, np.float32)
    padded[:, : rows * columns] = patches
    config = dataclasses.replace(VISION, sink="first key")
    found = run(VisionTower(config), nemo.tree, padded, places_of(rows, columns, size, 2))
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
    qwen, codes = Qwen(AUDIO), np.random.default_rng(0).integers(0, 20, (7, 4, 5))
    np.testing.assert_allclose(run(AudioEncoder(AUDIO), qwen.tree, codes), qwen.rows(codes), atol=1e-4)


def test_the_last_frames_of_codes_are_repeated():
    """A row needs four frames: the last one stands in for those that are missing."""
    codes = np.arange(6)[:, None] * np.ones(3, int)
    assert grouped(codes, 4)[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 5, 5]]


@pytest.fixture(scope="module")
def mlx() -> Mlx:
    return Mlx(TOKENIZER)


@pytest.mark.parametrize("frames", [4, 5, 6, 7, 33, 150, 301])
def test_codes_are_mlx_audios(mlx, frames):
    """All equal, at lengths that halve evenly and that do not; what lies behind the segment changes none."""
    mel = np.random.default_rng(frames).normal(size=(frames, 12)).astype(np.float32)
    expected = mlx.codes(mel)
    padded = np.full((320, 12), 99, np.float32)
    padded[:frames] = mel
    found = run(AudioTokenizer(TOKENIZER), mlx.tree, padded, np.array(frames, np.int32))
    assert code_count(frames) == len(expected)
    np.testing.assert_array_equal(found[: len(expected)], expected)


def test_codes_of_a_beginning_begin_the_codes():
    """Nothing looks ahead but the convolutions: all but the last codes of a shorter clip are the longer one's."""
    rng = np.random.default_rng(2)
    tree = init_audio_tokenizer(TOKENIZER, jax.random.key(0))
    mel = rng.normal(size=(256, 12)).astype(np.float32)
    whole, part = (run(AudioTokenizer(TOKENIZER), tree, mel, np.array(count, np.int32)) for count in (256, 160))
    np.testing.assert_array_equal(part[:39], whole[:39])
