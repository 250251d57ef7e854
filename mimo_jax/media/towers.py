"""From a part of a prompt to what the prompt shows of it, by the towers of a model."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from mimo_jax.config.model import ModelConfig
from mimo_jax.config.towers import AudioConfig, AudioTokenizerConfig, MediaConfig, VisionConfig
from mimo_jax.errors import UserError
from mimo_jax.media import images, recordings, videos
from mimo_jax.media.frames import time_stamp
from mimo_jax.media.parts import Audio, Image, Part, Video
from mimo_jax.media.pixels import Patches, patches_of
from mimo_jax.media.prompt import ROW, Shown
from mimo_jax.media.rows import audio_codes, audio_rows, row_count, vision_rows
from mimo_jax.modeling.audio_tokenizer import MEL_PER_CODE
from mimo_jax.weights import Params

Spell = Callable[[str], Sequence[int]]  # the tokenizer's, for time stamps


@dataclasses.dataclass(frozen=True, eq=False)
class Towers:
    """The towers of a model with this `config`, as files store them; `tokenizer` makes codes of sound."""

    config: ModelConfig
    params: Params
    tokenizer: tuple[AudioTokenizerConfig, Params] | None = None

    @property
    def media(self) -> MediaConfig:
        assert self.config.media is not None  # there are no towers without
        return self.config.media


def show(towers: Towers | None, part: Part, spell: Spell) -> Shown:
    """Decodes a part. UserError where it is damaged or too large, or where this model has no tower for it."""
    kind, shown = _KINDS[type(part)]
    if towers is None or getattr(towers.config, part.tower) is None:
        raise UserError(f"{part.where}: this model takes no {kind}: it has no {part.tower} tower")
    return shown(towers, part, spell)


def _image(towers: Towers, part: Part, spell: Spell) -> Shown:
    config, media = _vision(towers), towers.media
    pixels_HWC = images.decode(part.content(images.MOST_BYTES), part.where)
    patches = patches_of(pixels_HWC[None], config, media.image_min_pixels, media.image_max_pixels)
    ids = _frame(media, patches.tokens(config.merge))
    content = (patches.values_FSP, np.array([patches.rows, patches.columns]))
    return Shown("image", tuple(ids), lambda: _seen(towers, patches), _digest(config, *content))


def _audio(towers: Towers, part: Part, spell: Spell) -> Shown:
    config, tokenizer, _ = _hearing(towers, part)
    samples_S = recordings.decode(part.content(recordings.MOST_BYTES), tokenizer.sample_rate, part.where)
    ids = _stretch(towers.media, row_count(config, tokenizer, len(samples_S)))
    return Shown("audio", tuple(ids), lambda: _heard(towers, part, samples_S), _digest(config, samples_S))


def _video(towers: Towers, part: Part, spell: Spell) -> Shown:
    """Frames with their time, each followed by what is heard until the next one."""
    config, media = _vision(towers), towers.media
    rate = _hearing(towers, part)[1].sample_rate if towers.config.audio and towers.tokenizer else None
    film = videos.survey(part.content(videos.MOST_BYTES), config, media, rate, part.where)
    times, tokens = film.seconds(config), film.height * film.width // config.token_side**2
    shares = _shares(towers, part, film, times)
    ids = [media.video_start]
    for seconds, (first, last) in zip(times, shares):
        ids += [*spell(time_stamp(seconds)), *_frame(media, tokens)]
        ids += _stretch(media, last - first) if last > first else []
    ids.append(media.video_end)

    def rows() -> Float[np.ndarray, "R D"]:
        heard_RD = np.zeros((0, config.out_size), np.float32)
        if film.samples_S is not None:
            heard_RD = _heard(towers, part, film.samples_S)
        pairs = zip(film.patches(config), shares)
        return np.concatenate(
            [piece for seen, (first, last) in pairs for piece in (_seen(towers, seen), heard_RD[first:last])]
        )

    return Shown("video", tuple(ids), rows, _digest((config, media), np.frombuffer(film.data, np.uint8)))


def _shares(towers: Towers, part: Part, film: videos.Film, times: list[float]) -> list[tuple[int, int]]:
    """Which rows of the sound follow each temporal patch: those of the time until the next one."""
    if film.samples_S is None:
        return [(0, 0)] * len(times)
    config, tokenizer, _ = _hearing(towers, part)
    rows = row_count(config, tokenizer, len(film.samples_S))
    per_second = tokenizer.sample_rate / (tokenizer.hop * MEL_PER_CODE * config.group)
    ends = [min(int(per_second * seconds), rows) for seconds in (*times, film.duration)]
    return list(itertools.pairwise(ends))


def _frame(media: MediaConfig, tokens: int) -> list[int]:
    return [media.vision_start, *(ROW,) * tokens, media.vision_end]


def _stretch(media: MediaConfig, rows: int) -> list[int]:
    return [media.audio_start, *(ROW,) * rows, media.audio_end]


def _seen(towers: Towers, patches: Patches) -> Float[np.ndarray, "R D"]:
    return np.concatenate(vision_rows(_vision(towers), towers.params["vision"], patches, towers.config.dtype))


def _heard(towers: Towers, part: Part, samples_S: Float[np.ndarray, "S"]) -> Float[np.ndarray, "R D"]:
    config, tokenizer, params = _hearing(towers, part)
    codes_TN = audio_codes(tokenizer, params, samples_S, config.segment)
    return audio_rows(config, towers.params["audio"], codes_TN, towers.config.dtype)


def _vision(towers: Towers) -> VisionConfig:
    assert towers.config.vision is not None  # `show` has seen to it
    return towers.config.vision


def _hearing(towers: Towers, part: Part) -> tuple[AudioConfig, AudioTokenizerConfig, Params]:
    assert towers.config.audio is not None
    if towers.tokenizer is None:
        raise UserError(f"{part.where}: sound needs the model's folder audio_tokenizer/, which is missing")
    return towers.config.audio, *towers.tokenizer


def _digest(config: object, *content: np.ndarray) -> bytes:
    """128 bits of what rows are made of: what was decoded, its shape, and by which tower it is read."""
    found = hashlib.blake2b(repr(config).encode(), digest_size=16)
    for values in content:
        found.update(repr(values.shape).encode())
        found.update(np.ascontiguousarray(values).data)
    return found.digest()


# By part: how errors call the kind, and what shows it.
_KINDS: dict[type[Part], tuple[str, Callable[[Towers, Part, Spell], Shown]]] = {
    Image: ("images", _image),
    Audio: ("audio", _audio),
    Video: ("video", _video),
}
