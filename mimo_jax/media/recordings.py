"""Recordings as files hold them, decoded within limits."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Float

from mimo_jax.errors import UserError, one_line
from mimo_jax.media.sound import resample

MOST_BYTES = 50_000_000
MOST_SECONDS = 3600
RATES = (1000, 384_000)  # Hz


def decode(data: bytes, rate: int, where: str = "audio") -> Float[np.ndarray, "S"]:
    """Samples at `rate` Hz, all channels as one, of any format that libsndfile reads (WAV, FLAC, Ogg, MP3).

    Raises UserError where it is none, damaged, empty, or larger than `MOST_BYTES` or `MOST_SECONDS`.
    """
    if len(data) > MOST_BYTES:
        raise UserError(f"{where}: {len(data)} bytes; at most {MOST_BYTES} are read")
    try:
        import soundfile
    except ImportError:
        raise UserError(f"{where}: recordings need the `media` extra: pip install -e '.[media]'") from None
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            given, frames = file.samplerate, file.frames
            if not RATES[0] <= given <= RATES[1]:
                raise UserError(f"{where}: {given} samples a second; expected {RATES[0]} to {RATES[1]}")
            if frames > given * MOST_SECONDS:
                raise UserError(f"{where}: {frames / given:.0f} seconds; at most {MOST_SECONDS} are read")
            samples_SC = file.read(frames=frames, dtype="float32", always_2d=True)
    except UserError:
        raise
    except Exception as error:  # libsndfile's errors, and what a header that lies makes NumPy say
        raise UserError(f"{where}: not a recording that is read ({one_line(error)})") from None
    if not len(samples_SC):
        raise UserError(f"{where}: holds no sound")
    return mixed(samples_SC, given, rate)


def mixed(samples_SC: Float[np.ndarray, "S C"], given: int, rate: int) -> Float[np.ndarray, "M"]:
    """Channels at `given` Hz, each brought to `rate` Hz, then their mean."""
    channels = [resample(samples_SC[:, channel], given, rate) for channel in range(samples_SC.shape[1])]
    return np.stack(channels).mean(axis=0, dtype=np.float32)
