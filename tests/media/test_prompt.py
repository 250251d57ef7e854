"""Prompts with media: what they show, what is refused, and that nothing of decoding is different behind them."""

import dataclasses
import queue

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mimo_jax as mimo
from mimo_jax.decode import loop
from mimo_jax.drafters.mtp import MtpDrafter
from mimo_jax.drafters.prompt_lookup import PromptLookupDrafter
from mimo_jax.errors import UserError
from mimo_jax.generation import encode_prompt
from mimo_jax.media.parts import Audio, Image, Video
from mimo_jax.media.prompt import batched
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.serving.engine import Engine, Limits
from mimo_jax.serving.requests import TokenRequest, Update
from tests.media.models import CONFIG, MEDIA, model, mp4, png, wav

IMAGE, AUDIO, VIDEO = Image(png()), Audio(wav()), Video(mp4(sound=wav(2.0)))
EVERYTHING = [IMAGE, "What is this?", AUDIO, VIDEO, "And that?"]


def logits_after(held, prompt) -> np.ndarray:
    (ids,), rows = batched([encode_prompt(held, prompt)])
    weights = loop.with_media(held.weights, rows)
    return np.asarray(loop.prefill(held.decoder, weights, [ids], loop.capacity_for(len(ids)))[2])[0]


def test_an_image_is_framed_and_has_a_row_for_every_token():
    """40 x 56 pixels are read at 32 x 64 (multiples of 16, halves to even): 8 rows, between two tokens."""
    found = encode_prompt(model(), ["a", IMAGE, "b"])
    a, b = (model().tokenizer.encode(text)[0] for text in "ab")
    rows = range(4096, 4096 + 8)
    assert found.ids == (a, MEDIA.vision_start, *rows, MEDIA.vision_end, b)
    assert found.media.rows_RD.shape == (8, 64) and found.media.counts == {"image": 8}


def test_a_recording_has_a_row_for_every_four_codes():
    """4,000 samples are 17 spectra, of 9, then 5 frames of codes: two rows."""
    found = encode_prompt(model(), [AUDIO])
    assert found.ids == (MEDIA.audio_start, 4096, 4097, MEDIA.audio_end)
    assert found.media.rows_RD.shape == (2, 64)


def test_a_video_tells_the_time_of_its_frames_and_is_heard_between_them():
    """Two seconds: eight frames in four pairs, each pair's time, rows and what is heard until the next one."""
    spelled = [model().tokenizer.encode(stamp, literal=True) for stamp in ("00:00", "00:00", "00:01", "00:01")]
    expected, row = [MEDIA.video_start], 4096
    heard = [int(4000 / 3840 * seconds) for seconds in (0, 0.5, 1, 1.5, 2)]  # frames 0, 3, 6 and 9 of 12
    for stamp, rows in zip(spelled, np.diff(heard)):
        expected += [*stamp, MEDIA.vision_start, *range(row, row + 12), MEDIA.vision_end]
        row += 12
        if rows:
            expected += [MEDIA.audio_start, *range(row, row + rows), MEDIA.audio_end]
            row += rows
    expected.append(MEDIA.video_end)
    found = encode_prompt(model(), [VIDEO])
    assert found.ids == tuple(expected)
    assert len(found.media.rows_RD) == row - 4096
    silent = encode_prompt(model(), [Video(mp4())])
    assert MEDIA.audio_start not in silent.ids and len(silent.media.rows_RD) == 48


def test_rows_take_the_place_of_embeddings():
    """The logits are those of a model whose vocabulary has the rows as further tokens."""
    found = encode_prompt(model(), EVERYTHING)
    rows = found.media.rows_RD
    wider = dataclasses.replace(CONFIG, vocab_size=4096 + len(rows))
    params = {name: jnp.concatenate([model().params[name], rows]) for name in ("embed", "head")}
    apply = jax.jit(lambda ids: Backbone(wider).apply({"params": {**model().params, **params}}, ids)[0][0, -1, :4096])
    expected = apply(np.array([found.ids]))
    np.testing.assert_allclose(logits_after(model(), EVERYTHING), expected, atol=2e-5)
    blank = [token if token < 4096 else MEDIA.image_token for token in found.ids]
    assert np.abs(apply(np.array([blank])) - expected).max() > 0.1


@pytest.mark.parametrize("prompt", [EVERYTHING, [Image(png(200, 320)), "x"]], ids=["everything", "several chunks"])
def test_the_native_step_reads_the_same_rows(prompt):
    """Also where they lie in several chunks of a prompt."""
    expected = logits_after(model(), prompt)
    np.testing.assert_allclose(logits_after(model("native"), prompt), expected, atol=1e-3)


@pytest.mark.parametrize("drafter", [PromptLookupDrafter(), MtpDrafter(CONFIG)], ids=["lookup", "mtp"])
def test_drafting_goes_on_behind_media(drafter):
    """Greedy text is the plain text, and no draft is a row."""
    plain = mimo.generate(model(), EVERYTHING, max_tokens=40)
    drafted = mimo.generate(dataclasses.replace(model(), drafter=drafter), EVERYTHING, max_tokens=40)
    assert drafted.tokens == plain.tokens and max(drafted.tokens) < 4096


def test_a_batch_mixes_prompts_with_and_without_media():
    """Every row is what it is alone."""
    prompts = [["a", IMAGE], "def f(", [Image(png(seed=1)), AUDIO, "b"]]
    found = mimo.generate_batch(model(), prompts, max_tokens=12)
    assert [row.tokens for row in found] == [mimo.generate(model(), one, max_tokens=12).tokens for one in prompts]


def test_other_pixels_are_another_prompt():
    tokens = [mimo.generate(model(), [Image(png(seed=seed)), "x"], max_tokens=12).tokens for seed in (0, 1, 0)]
    assert tokens[0] == tokens[2] != tokens[1]


@pytest.mark.parametrize("layout", ["dense", "native"])
def test_a_prefix_is_known_by_what_it_shows(layout):
    """Images of one size have the same ids: only equal ones share a cache, and a text is never another's."""
    held = model(layout)
    with Engine(held, Limits(slots=2, context=600)) as engine:
        for seed, is_known in ((0, False), (1, False), (0, True), (1, True)):
            prompt = [Image(png(320, 320, seed)), "What is this?"]
            encoded, updates, box = encode_prompt(held, prompt), list[Update](), queue.SimpleQueue()
            engine.submit(TokenRequest(encoded.ids, 12, media=encoded.media), box.put)
            while not updates or updates[-1].finish is None:
                updates.append(box.get(timeout=60))
            tokens = [token for update in updates for token in update.tokens]
            assert tokens == mimo.generate(held, prompt, max_tokens=12).tokens
            assert (updates[-1].usage.cached_tokens >= 256) == is_known


REFUSED = {
    "no tower": (
        lambda: encode_prompt(dataclasses.replace(model(), towers=None), [IMAGE]),
        "image: this model takes no images: it has no vision tower",
    ),
    "pad in ids": (lambda: encode_prompt(model(), [1, MEDIA.image_token]), "token id 4000 stands for media"),
    "missing file": (lambda: encode_prompt(model(), [Image("none.png")]), "none.png: not found"),
    "nothing": (lambda: encode_prompt(model(), [""]), "prompt: empty"),
    "too long": (
        lambda: encode_prompt(model(), [Image(png(500, 500)), Image(png(500, 500))] * 3),
        "the context holds 1024",
    ),
    "row by id": (lambda: encode_prompt(model(), [4096]), "token id 4096 is outside the vocabulary of 4096"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case):
    run, message = case
    with pytest.raises(UserError, match=message):
        run()
