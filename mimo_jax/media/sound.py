"""From samples to a log-mel spectrogram, in NumPy: what the audio tokenizer reads.

Resampling is torchaudio's default (windowed sinc, Hann, six zero crossings, rolloff 0.99), tap by tap; the spectrogram
is one of magnitudes, with HTK's mel bands without area norm.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from mimo_jax.config.towers import AudioTokenizerConfig
from mimo_jax.errors import UserError

CROSSINGS, ROLLOFF = 6, 0.99
FLOOR = 1e-7  # of a magnitude, before its logarithm
_AT_ONCE = 1 << 16  # output samples


def resample(samples_S: Float[np.ndarray, "S"], given: int, wanted: int) -> Float[np.ndarray, "M"]:
    """Samples at `given` Hz as samples at `wanted` Hz; M is S wanted / given, rounded up."""
    if given == wanted:
        return samples_S.astype(np.float32)
    count, cutoff = -(-len(samples_S) * wanted // given), min(given, wanted) * ROLLOFF
    reach = int(np.ceil(CROSSINGS * given / cutoff))
    padded = np.pad(samples_S.astype(np.float32), (reach, reach + 1))
    taps_W = np.arange(-reach, reach + 1)
    pieces = []
    for first in range(0, count, _AT_ONCE):
        out_M = np.arange(first, min(first + _AT_ONCE, count))
        nearest_M = out_M * given // wanted
        source_MW = nearest_M[:, None] + taps_W
        # In integers first: seconds as floats would lose the place of late samples.
        apart_MW = (source_MW * wanted - out_M[:, None] * given) / (given * wanted) * cutoff
        inside_MW = np.abs(apart_MW) < CROSSINGS
        window_MW = np.cos(apart_MW * np.pi / CROSSINGS / 2) ** 2 * inside_MW
        kernel_MW = np.sinc(apart_MW) * window_MW * (cutoff / given)
        pieces.append(np.sum(padded[source_MW + reach] * kernel_MW, axis=1).astype(np.float32))
    return np.concatenate(pieces)


def frame_count(samples: int, config: AudioTokenizerConfig) -> int:
    """Of the spectrogram of so many samples. UserError where they are too few for one."""
    half = config.window_samples // 2
    if samples <= half:
        raise UserError(f"audio: {samples} samples; more than {half} are needed")
    return 1 + samples // config.hop


def log_mel(samples_S: Float[np.ndarray, "S"], config: AudioTokenizerConfig) -> Float[np.ndarray, "T M"]:
    """T frames of `config.mels` bands, of samples at `config.sample_rate`."""
    frame_count(len(samples_S), config)
    size, half = config.window_samples, config.window_samples // 2
    padded = np.pad(samples_S.astype(np.float32), half, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)  # periodic
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[:: config.hop]
    bands_FM = mel_bands(config).astype(np.float32)
    frames = []
    for first in range(0, len(windows), 1024):
        magnitude = np.abs(np.fft.rfft(windows[first : first + 1024] * hann, axis=-1)).astype(np.float32)
        frames.append(np.log(np.maximum(magnitude @ bands_FM, np.float32(FLOOR))))
    return np.concatenate(frames)


def mel_bands(config: AudioTokenizerConfig) -> Float[np.ndarray, "F M"]:
    """Triangles over the frequencies of the transform, between points equally far apart in HTK's mel, from 0 Hz on."""
    nyquist = config.sample_rate / 2
    points = np.linspace(0, 2595 * np.log10(1 + nyquist / 700), config.mels + 2)
    hertz = 700 * (10 ** (points / 2595) - 1)
    frequency_F1 = np.linspace(0, nyquist, config.window_samples // 2 + 1)[:, None]
    rising = (frequency_F1 - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])
    falling = (hertz[2:] - frequency_F1) / (hertz[2:] - hertz[1:-1])
    return np.maximum(0, np.minimum(rising, falling))
