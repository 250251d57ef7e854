"""Recordings become spectrograms: resampling by its definition, mel bands as mlx-audio's, limits and damage named."""

import io
import struct
import wave

import numpy as np
import pytest

from mimo_jax.config.towers import AudioTokenizerConfig
from mimo_jax.errors import UserError
from mimo_jax.media import recordings
from mimo_jax.media.sound import log_mel, resample

CONFIG = AudioTokenizerConfig()
NOISE = np.random.default_rng(0).uniform(-0.9, 0.9, 9000).astype(np.float32)


def wav(samples_NC: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(samples_NC.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples_NC * 32_767).astype("<i2").tobytes())
    return file.getvalue()


@pytest.mark.parametrize(("given", "wanted"), [(16_000, 24_000), (44_100, 24_000), (8_000, 24_000), (48_001, 24_000)])
def test_resampling_is_its_definition(given, wanted):
    """Sample by sample, the sum over all of them of sinc x Hann, in float64."""
    found, cutoff = resample(NOISE[:700], given, wanted), min(given, wanted) * 0.99
    assert len(found) == -(-700 * wanted // given)
    for place in range(0, len(found), 37):
        apart = (np.arange(700) / given - place / wanted) * cutoff
        window = np.where(np.abs(apart) < 6, np.cos(apart * np.pi / 12) ** 2, 0)
        assert found[place] == pytest.approx(np.sum(NOISE[:700] * np.sinc(apart) * window) * cutoff / given, abs=1e-5)


def test_a_tone_stays_a_tone():
    """1 kHz at 44.1 kHz is 1 kHz at 24 kHz, away from the ends."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(44_100) / 44_100).astype(np.float32)
    expected = np.sin(2 * np.pi * 1000 * np.arange(24_000) / 24_000)
    np.testing.assert_allclose(resample(tone, 44_100, 24_000)[100:-100], expected[100:-100], atol=2e-3)


def test_the_spectrogram_is_mlx_audios():
    """On a linear scale, to float32's rounding; frames counted as stated."""
    core = pytest.importorskip("mlx.core")
    theirs = pytest.importorskip("mlx_audio.codec.models.mimo_audio_tokenizer.audio")
    config = pytest.importorskip("mlx_audio.codec.models.mimo_audio_tokenizer.config").ModelConfig(d_model=1280)
    found, expected = log_mel(NOISE, CONFIG), np.array(theirs.log_mel_spectrogram(core.array(NOISE), config))
    assert found.shape == (1 + 9000 // 240, 128)
    np.testing.assert_allclose(np.exp(found), np.exp(expected.reshape(found.shape)), rtol=5e-5, atol=1e-3)


def test_channels_are_resampled_and_averaged():
    """Two channels at 48 kHz: their mean at 24 kHz."""
    both = np.stack([NOISE, -0.5 * NOISE], axis=1)
    np.testing.assert_allclose(
        recordings.decode(wav(both, 48_000), 24_000), 0.25 * resample(NOISE, 48_000, 24_000), atol=1e-3
    )
    assert not recordings.decode(wav(np.zeros((2400, 1)), 24_000), 24_000).any()  # silence is a recording


def test_what_cannot_be_read_is_named(monkeypatch):
    """Empty, damaged, of absurd rates, too long, too short for a window: one line each."""
    whole = wav(NOISE[:, None], 24_000)
    for data in (b"", b"RIFF", whole[:20], b"ID3" + bytes(50), bytes(4000)):
        with pytest.raises(UserError, match=r"^a\.wav: not a recording that is read"):
            recordings.decode(data, 24_000, "a.wav")
    with pytest.raises(UserError, match="holds no sound"):
        recordings.decode(wav(np.zeros((0, 1)), 24_000), 24_000)
    for rate in (1, 2**31 - 1):
        with pytest.raises(UserError, match="samples a second; expected 1000 to 384000"):
            recordings.decode(whole[:24] + struct.pack("<I", rate) + whole[28:], 24_000)
    with pytest.raises(UserError, match="480 samples; more than 480 are needed"):
        log_mel(NOISE[:480], CONFIG)
    monkeypatch.setattr(recordings, "MOST_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"seconds; at most 0\.1 are read"):
        recordings.decode(whole, 24_000)
