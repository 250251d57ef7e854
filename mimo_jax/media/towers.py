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
    field, kind, shown = _KINDS[type(part)]
    if towers is None or getattr(towers.config, field) is None:
        raise UserError(f"{part.where}: this model takes no {kind}: it has no {field} tower")
    return shown(towers, part, spell)


def _image(towers: Towers, part: Part, spell: Spell) -> Shown:
    config, media = _vision(towers), towers.media
    pixels_HWC = images.decode(part.content(images.MOST_BYTES), part.where)
    patches = patches_of(pixels_HWC[None], config, media.image_min_pixels, media.image_max_pixels)
    ids = _frame(media, config, patches)
    return Shown("image", tuple(ids), lambda: np.concatenate(_seen(towers, patches)), _digest(config, patches))


def _audio(towers: Towers, part: Part, spell: Spell) -> Shown:
    config, tokenizer, _ = _hearing(towers, part)
    samples_S = recordings.decode(part.content(recordings.MOST_BYTES), tokenizer.sample_rate, part.where)
    ids = _stretch(towers.media, row_count(config, tokenizer, len(samples_S)))
    return Shown("audio", tuple(ids), lambda: _heard(towers, part, samples_S), _digest(config, samples_S))


def _video(towers: Towers, part: Part, spell: Spell) -> Shown:
    """Frames with their time, each followed by what is heard until the next one."""
    config, media = _vision(towers), towers.media
    rate = _hearing(towers, part)[1].sample_rate if towers.config.audio and towers.tokenizer else None
    film = videos.decode(part.content(videos.MOST_BYTES), config, media, rate, part.where)
    shares = _shares(towers, part, film)
    ids = [media.video_start]
    for seconds, (first, last) in zip(film.seconds, shares):
        ids += [*spell(time_stamp(seconds)), *_frame(media, config, film.patches)]
        ids += _stretch(media, last - first) if last > first else []
    ids.append(media.video_end)

    def rows() -> Float[np.ndarray, "R D"]:
        seen_FMD = _seen(towers, film.patches)
        heard_RD = seen_FMD[0, :0] if film.samples_S is None else _heard(towers, part, film.samples_S)
        pairs = [(seen_MD, heard_RD[first:last]) for seen_MD, (first, last) in zip(seen_FMD, shares)]
        return np.concatenate([rows for pair in pairs for rows in pair])

    times = np.array([film.seconds, *zip(*shares)])
    return Shown("video", tuple(ids), rows, _digest(config, film.patches, film.samples_S, times))


def _shares(towers: Towers, part: Part, film: videos.Film) -> list[tuple[int, int]]:
    """Which rows of the sound follow each frame: those of the time until the next one."""
    if film.samples_S is None:
        return [(0, 0)] * len(film.seconds)
    config, tokenizer, _ = _hearing(towers, part)
    rows = row_count(config, tokenizer, len(film.samples_S))
    per_second = tokenizer.sample_rate / (tokenizer.hop * MEL_PER_CODE * config.group)
    ends = [min(int(per_second * seconds), rows) for seconds in (*film.seconds, film.duration)]
    return list(itertools.pairwise(ends))


def _frame(media: MediaConfig, config: VisionConfig, patches: Patches) -> list[int]:
    return [media.vision_start, *(ROW,) * patches.tokens(config.merge), media.vision_end]


def _stretch(media: MediaConfig, rows: int) -> list[int]:
    return [media.audio_start, *(ROW,) * rows, media.audio_end]


def _seen(towers: Towers, patches: Patches) -> Float[np.ndarray, "F M D"]:
    return vision_rows(_vision(towers), towers.params["vision"], patches, towers.config.dtype)


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


def _digest(config: object, *content: Patches | np.ndarray | None) -> bytes:
    """128 bits of what rows are made of: what was decoded, its shape, and by which tower it is read."""
    found = hashlib.blake2b(repr(config).encode(), digest_size=16)
    for each in content:
        values = each.values_FSP if isinstance(each, Patches) else np.zeros(0) if each is None else each
        grid = (each.rows, each.columns) if isinstance(each, Patches) else ()
        found.update(repr((values.shape, *grid)).encode())
        found.update(np.ascontiguousarray(values).tobytes())
    return found.digest()


# By part: the field of the tower's config, how errors call the kind, and what shows it.
_KINDS: dict[type[Part], tuple[str, str, Callable[[Towers, Part, Spell], Shown]]] = {
    Image: ("vision", "images", _image),
    Audio: ("audio", "audio", _audio),
    Video: ("vision", "video", _video),
}
