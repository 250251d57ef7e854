"""A small model with random towers, and small files of every kind."""

from __future__ import annotations

import functools
import io

import jax
import numpy as np
from PIL import Image

import mimo_jax as mimo
from mimo_jax import layouts
from mimo_jax.config.towers import MEDIA_TOKENS, AudioConfig, AudioTokenizerConfig, MediaConfig, VisionConfig
from mimo_jax.decode.sampling import Greedy
from mimo_jax.loading import Model
from mimo_jax.media.towers import Towers
from mimo_jax.modeling.audio import init_audio
from mimo_jax.modeling.audio_tokenizer import init_audio_tokenizer
from mimo_jax.modeling.vision import init_vision
from mimo_jax.tokenizer import Tokenizer
from tests.tiny import random_params, tiny_config

VISION = VisionConfig(
    64, (-1, 0, 1, -1), 32, 48, num_heads=4, num_kv_heads=2, head_dim=16, patch=8, window=6, init_range=0.1
)
AUDIO = AudioConfig(
    64, channels=3, segment=96, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=48, codes=16
)
TOKENIZER = AudioTokenizerConfig(
    (16, 16, 8, 8), hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, window=5, mels=20, sample_rate=4000
)
LIMITS = {"image_min_pixels": 1024, "image_max_pixels": 65_536, "video_min_pixels": 1024, "video_max_pixels": 4096}
MEDIA = MediaConfig(**{name: 4000 + index for index, name in enumerate(MEDIA_TOKENS)}, **LIMITS, fps=2.0)
CONFIG = tiny_config(vocab_size=4096, max_position=1024, vision=VISION, audio=AUDIO, media=MEDIA)
RNG = np.random.default_rng(0)


@functools.cache
def towers() -> Towers:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"vision": init_vision(VISION, keys[0]), "audio": init_audio(AUDIO, keys[1])}
    params["audio"]["projection_2"]["weight"] *= 40  # as loud as embeddings
    return Towers(CONFIG, params, (TOKENIZER, init_audio_tokenizer(TOKENIZER, keys[2])))


@functools.cache
def model(layout: str = "dense") -> Model:
    params = random_params(CONFIG)
    _, config, held = layouts.for_device(CONFIG, params, None, layout, None)
    tokenizer = Tokenizer.load(mimo.BUNDLED / "tokenizer.json")
    return Model(config, held, tokenizer, (2,), Greedy(), layout, towers=towers())


def png(height: int = 40, width: int = 56, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav(seconds: float = 1.0, rate: int = 4000, channels: int = 1, seed: int = 0) -> bytes:
    import soundfile

    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (int(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def mp4(frames: int = 12, fps: int = 6, size: tuple[int, int] = (48, 64), sound: bytes | None = None) -> bytes:
    """Frames get brighter and brighter."""
    import av
    import soundfile

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=fps)  # lossless
        stream.height, stream.width, stream.pix_fmt = *size, "bgr0"
        heard = None
        if sound is not None:
            samples, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
            heard = container.add_stream("pcm_f32le", rate=rate, layout="mono")
        for index in range(frames):
            pixels = np.full((*size, 3), 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        if heard is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="flt", layout="mono")
            frame.sample_rate = rate
            container.mux(heard.encode(frame))
            container.mux(heard.encode())
    return file.getvalue()
