"""From files to logits, each kind of media: transformers' text model behind independent towers, spliced here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimo_jax.config.towers import MEDIA_TOKENS, AudioConfig, AudioTokenizerConfig, MediaConfig, VisionConfig
from mimo_jax.decode import loop
from mimo_jax.decode.drafter import Weights
from mimo_jax.decode.loop import Decoder
from mimo_jax.decode.step import FlaxStep
from mimo_jax.media import images, recordings, videos
from mimo_jax.media.parts import Audio, Image, Video
from mimo_jax.media.pixels import patches_of
from mimo_jax.media.prompt import assemble, batched
from mimo_jax.media.sound import log_mel
from mimo_jax.media.towers import Towers, show
from mimo_jax.modeling.audio import grouped
from tests.media.models import mp4, png, wav
from tests.modeling.test_transformers import convert, random_reference
from tests.modeling.tower_oracles import Mlx, Nemo, Qwen
from tests.tiny import tiny_config

# Sinks as NeMo has them; the other reading is tested by its equations in test_towers.
VISION = VisionConfig(64, (-1, 0, 1, -1), 32, 48, 4, 2, 16, patch=8, window=6, sink="first key")
AUDIO = AudioConfig(64, channels=4, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, codes=20)
TOKENIZER = AudioTokenizerConfig((16, 16, 8, 8), 32, 5, 4, 48, window=5, mels=20, sample_rate=4000)
LIMITS = {"image_min_pixels": 1024, "video_min_pixels": 1024, "video_max_pixels": 2048}
MEDIA = MediaConfig(**{name: 200 + index for index, name in enumerate(MEDIA_TOKENS)}, **LIMITS)
CONFIG = tiny_config(vision=VISION, audio=AUDIO, media=MEDIA, mtp_layers=0)
FRAME = {"image": (MEDIA.vision_start, MEDIA.vision_end), "audio": (MEDIA.audio_start, MEDIA.audio_end)}


@pytest.fixture(scope="module")
def oracles() -> tuple[Nemo, Mlx, Qwen]:
    nemo, mlx, qwen = Nemo(VISION), Mlx(TOKENIZER), Qwen(AUDIO)
    for tree in (nemo.tree["merger"]["mlp_2"], qwen.tree["projection_2"]):
        tree["weight"] *= 0.02  # in place, so that both have it: rows as loud as embeddings
    return nemo, mlx, qwen


def spell(text: str) -> list[int]:
    return list(text.encode())


def seen(oracles, patches) -> np.ndarray:
    return oracles[0].rows(patches.values_FSP, patches.rows, patches.columns)


def of_image(oracles) -> list:
    data = png()
    patches = patches_of(images.decode(data)[None], VISION, 1024, MEDIA.image_max_pixels)
    return [Image(data), [MEDIA.vision_start, *seen(oracles, patches), MEDIA.vision_end]]


def of_audio(oracles) -> list:
    data = wav(1.5, rate=8000, channels=2)
    mel = log_mel(recordings.decode(data, 4000), TOKENIZER)
    rows = oracles[2].rows(grouped(oracles[1].codes(mel), 4))
    return [Audio(data), [MEDIA.audio_start, *rows, MEDIA.audio_end]]


def of_video(oracles) -> list:
    """Two seconds with sound: frames 0, 3, 6 and 9 of 12 begin the four pairs."""
    data, sound = mp4(sound=wav(4.0)), wav(4.0)
    rows = [seen(oracles, patches) for patches in videos.survey(data, VISION, MEDIA, None).patches(VISION)]
    heard = oracles[2].rows(grouped(oracles[1].codes(log_mel(recordings.decode(sound, 4000), TOKENIZER)), 4))
    ends = [int(4000 / 3840 * seconds) for seconds in (0, 3 / 6, 6 / 6, 9 / 6, 2)]
    told = [MEDIA.video_start]
    for stamp, own, first, last in zip(("00:00", "00:00", "00:01", "00:01"), rows, ends, ends[1:]):
        told += [*spell(stamp), MEDIA.vision_start, *own, MEDIA.vision_end]
        told += [MEDIA.audio_start, *heard[first:last], MEDIA.audio_end] if last > first else []
    return [Video(data), [*told, MEDIA.video_end]]


@pytest.mark.parametrize("kind", [of_image, of_audio, of_video])
def test_logits_behind_media_are_transformers(oracles, kind):
    """Within 1e-4 in float32, for a prompt of text, one medium, and text."""
    part, told = kind(oracles)
    reference = random_reference(CONFIG)
    params = convert(reference, CONFIG)
    before, after = spell("What is "), spell("? It is")
    table = np.asarray(params["embed"])
    embedded = np.stack([table[one] if np.ndim(one) == 0 else one for one in [*before, *told, *after]])
    with torch.no_grad():
        given = torch.tensor(embedded, dtype=torch.float32)[None]
        expected = reference(inputs_embeds=given, use_cache=False).logits.numpy()[0, -1]
    nemo, mlx, qwen = oracles
    towers = Towers(CONFIG, {"vision": nemo.tree, "audio": qwen.tree}, (TOKENIZER, mlx.tree))
    prompt = assemble([before, show(towers, part, spell), after], CONFIG.vocab_size)
    (ids,), rows = batched([prompt])
    decoder = Decoder(FlaxStep(CONFIG))
    weights = loop.with_media(Weights(params), rows)
    found = loop.prefill(decoder, weights, [ids], loop.capacity_for(len(ids)))[2]
    assert 2 < np.abs(expected).max() < 30, "logits must be of a realistic scale"
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
