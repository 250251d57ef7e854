"""Media become rows: as many as the prompt has places for, the same in any compiled size, segments by themselves."""

import dataclasses

import jax
import numpy as np
import pytest

from mimo_jax.config.towers import AudioConfig, AudioTokenizerConfig, VisionConfig
from mimo_jax.media.pixels import patches_of
from mimo_jax.media.rows import audio_codes, audio_rows, size_for, vision_rows
from mimo_jax.media.sound import log_mel
from mimo_jax.modeling.audio import AudioEncoder, grouped, init_audio
from mimo_jax.modeling.audio_tokenizer import AudioTokenizer, init_audio_tokenizer
from mimo_jax.modeling.vision import VisionTower, init_vision, places_of

VISION = VisionConfig(24, (-1, 0, 1), 32, 48, num_heads=4, num_kv_heads=2, head_dim=16, window=6)
AUDIO = AudioConfig(24, channels=3, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=48, codes=16)
TOKENIZER = AudioTokenizerConfig(
    (16, 8, 8, 4), hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, window=5, mels=20
)
RNG = np.random.default_rng(0)


def test_sizes_double():
    assert [size_for(count, 16) for count in (1, 16, 17, 32, 33, 1000)] == [16, 16, 32, 32, 64, 1024]


def test_rows_of_a_video_are_the_towers():
    """Three frames, the last one repeated: two temporal patches, each by itself, padded or not."""
    params = init_vision(VISION, jax.random.key(0))
    patches = patches_of(RNG.uniform(0, 255, (3, 96, 128, 3)), VISION, 1024, 10**6)
    found = vision_rows(VISION, params, patches)
    assert found.shape == (2, 12, 24)
    apply = jax.jit(VisionTower(VISION).apply)
    expected = apply({"params": params}, patches.values_FSP, places_of(6, 8, 48, 2))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    coarse = vision_rows(VISION, params, patches, "bfloat16")
    assert np.abs(coarse - found).max() < 0.05 * np.abs(found).max()


@pytest.mark.parametrize("frames", [250, 96])
def test_rows_of_sound_are_the_encoders(frames):
    """Segments of 96 mel frames by themselves; a row for every four codes; the first channels alone are read."""
    tokenizer, params = init_audio_tokenizer(TOKENIZER, jax.random.key(1)), init_audio(AUDIO, jax.random.key(2))
    samples = RNG.uniform(-0.5, 0.5, 240 * (frames - 1)).astype(np.float32)
    codes, mel = audio_codes(TOKENIZER, tokenizer, samples, 96), log_mel(samples, TOKENIZER)
    apply = jax.jit(AudioTokenizer(TOKENIZER).apply)
    pieces = [mel[first : first + 96] for first in range(0, frames, 96)]
    alone = [np.asarray(apply({"params": tokenizer}, piece, np.array(len(piece), np.int32))) for piece in pieces]
    np.testing.assert_array_equal(codes, np.concatenate(alone))
    rows = audio_rows(AUDIO, params, codes)
    assert len(rows) == -(-len(codes) // 4)
    encode = jax.jit(AudioEncoder(AUDIO).apply)
    np.testing.assert_allclose(rows, encode({"params": params}, grouped(codes[:, :3], 4)), atol=1e-5)


def test_codes_beyond_the_encoders_channels_are_left_out():
    codes = RNG.integers(0, 4, (8, 4))
    params = init_audio(AUDIO, jax.random.key(2))
    changed = np.concatenate([codes[:, :3], 3 - codes[:, 3:]], axis=1)
    np.testing.assert_array_equal(audio_rows(AUDIO, params, codes), audio_rows(AUDIO, params, changed))
    wider = dataclasses.replace(AUDIO, channels=4)
    assert audio_rows(wider, init_audio(wider, jax.random.key(2)), codes).shape == (2, 24)
