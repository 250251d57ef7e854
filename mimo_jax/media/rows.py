"""Media as rows that stand in for tokens: the towers, run on inputs of any size in a few compiled sizes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.config.towers import AudioConfig, AudioTokenizerConfig, VisionConfig
from mimo_jax.media.pixels import Patches
from mimo_jax.media.sound import frame_count, log_mel
from mimo_jax.modeling.audio import AudioEncoder, grouped
from mimo_jax.modeling.audio_tokenizer import AudioTokenizer, code_count
from mimo_jax.modeling.vision import Places, VisionTower, places_of
from mimo_jax.weights import Params

_FEWEST_PATCHES, _FEWEST_FRAMES, _FEWEST_GROUPS = 256, 512, 16  # of the smallest compiled sizes


def size_for(count: int, fewest: int) -> int:
    """The smallest of `fewest`, 2 x `fewest`, 4 x `fewest` ... that holds `count`."""
    return fewest << max(0, (-(-count // fewest) - 1).bit_length())


def vision_rows(
    config: VisionConfig, params: Params, patches: Patches, dtype: str = "float32"
) -> Float[np.ndarray, "F M O"]:
    """Rows of an image or a video, frame by frame; activations in `dtype`."""
    count = patches.rows * patches.columns
    size = size_for(count, _FEWEST_PATCHES)
    places = places_of(patches.rows, patches.columns, size, config.merge)
    padded_FSP = np.pad(patches.values_FSP, ((0, 0), (0, size - count), (0, 0)))
    frames = [_see(config, params, frame_SP[None].astype(jnp.dtype(dtype)), places) for frame_SP in padded_FSP]
    return np.concatenate([np.asarray(rows, np.float32) for rows in frames])[:, : count // config.merge**2]


@partial(jax.jit, static_argnames="config")
def _see(config: VisionConfig, params: Params, patches_FSP: Array, places: Places) -> Array:
    return VisionTower(config).apply({"params": params}, patches_FSP, places)


def row_count(config: AudioConfig, tokenizer: AudioTokenizerConfig, samples: int) -> int:
    """How many rows so many samples at the tokenizer's rate become."""
    whole, rest = divmod(frame_count(samples, tokenizer), config.segment)
    codes = whole * code_count(config.segment) + (code_count(rest) if rest else 0)
    return -(-codes // config.group)


def audio_codes(
    config: AudioTokenizerConfig, params: Params, samples_S: Float[np.ndarray, "S"], segment: int
) -> Int[np.ndarray, "T N"]:
    """Codes of samples at the tokenizer's rate, each `segment` mel frames by themselves. In float32."""
    mel_TM = log_mel(samples_S, config)
    pieces = [mel_TM[first : first + segment] for first in range(0, len(mel_TM), segment)]
    return np.concatenate([_codes(config, params, piece) for piece in pieces])


def _codes(config: AudioTokenizerConfig, params: Params, mel_TM: np.ndarray) -> np.ndarray:
    size = size_for(len(mel_TM), _FEWEST_FRAMES)
    padded = np.pad(mel_TM, ((0, size - len(mel_TM)), (0, 0)))
    return np.asarray(_hear(config, params, padded, np.asarray(len(mel_TM), np.int32)))[: code_count(len(mel_TM))]


@partial(jax.jit, static_argnames="config")
def _hear(config: AudioTokenizerConfig, params: Params, mel_TM: Array, count: Array) -> Array:
    return AudioTokenizer(config).apply({"params": params}, mel_TM, count)


def audio_rows(
    config: AudioConfig, params: Params, codes_TN: Int[np.ndarray, "T N"], dtype: str = "float32"
) -> Float[np.ndarray, "G O"]:
    """Rows of codes of the first channels; activations in `dtype`."""
    groups = grouped(codes_TN[:, : config.channels], config.group)
    padded = np.pad(groups, ((0, size_for(len(groups), _FEWEST_GROUPS) - len(groups)), (0, 0), (0, 0)))
    return np.asarray(_understand(config, dtype, params, padded), np.float32)[: len(groups)]


@partial(jax.jit, static_argnames=("config", "dtype"))
def _understand(config: AudioConfig, dtype: str, params: Params, codes_GTN: Array) -> Array:
    return AudioEncoder(config, dtype).apply({"params": params}, codes_GTN)
