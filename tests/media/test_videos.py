"""Videos: which frames are kept, at which size, with what sound; and what is refused."""

import io

import av
import numpy as np
import pytest

from mimo_jax.errors import UserError
from mimo_jax.media.images import MOST_PIXELS
from mimo_jax.media.pixels import MEAN, STD
from mimo_jax.media.videos import survey
from tests.media.models import MEDIA, VISION, mp4, wav


def test_frames_are_those_of_the_rule():
    """Eight of 12, each 10 brighter than the one before it in the file; the first of a pair tells the time."""
    film = survey(mp4(), VISION, MEDIA, None)
    assert film.seconds(VISION) == [0, 0.5, 1, 1.5] and film.duration == 2 and film.samples_S is None
    found = list(film.patches(VISION))
    assert [(one.rows, one.columns) for one in found] == [(6, 8)] * 4 and (film.height, film.width) == (48, 64)
    levels = (
        np.concatenate([one.values_FSP for one in found])
        .reshape(4, 48, 3, 2, 64)
        .mean(axis=(1, 4))
        .swapaxes(1, 2)
        .reshape(8, 3)
    )
    expected = (np.array([0, 1, 3, 4, 6, 7, 9, 11])[:, None] * 10 / 255 - MEAN) / STD
    np.testing.assert_allclose(levels, expected, atol=1e-4)


def test_an_odd_number_of_frames_repeats_the_last():
    film = survey(mp4(frames=1), VISION, MEDIA, None)
    (patches,) = film.patches(VISION)
    assert patches.values_FSP.shape[0] == 1 and film.seconds(VISION) == [0]
    values = patches.values_FSP.reshape(48, 3, 2, 64)
    np.testing.assert_array_equal(values[:, :, 0], values[:, :, 1])


def test_sound_is_brought_to_the_tokenizers_rate():
    film = survey(mp4(sound=wav(2.0, rate=8000)), VISION, MEDIA, 4000)
    assert film.samples_S is not None and len(film.samples_S) == 8000


def empty_video() -> bytes:
    """Sound alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_f32le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="flt", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


WHOLE = mp4()
REFUSED = {
    "sound alone": (empty_video(), "video: holds no frame"),
    "nothing": (b"", "video: not a video that is read"),
    "text": (b"hello" * 100, "video: not a video that is read"),
    "header alone": (WHOLE[:600], "video: not a video|video: holds no frame"),
    "too many bytes": (b"x" * 50_000_001, "video: 50000001 bytes; at most 50000000 are read"),
    "too many pixels": (mp4(frames=1, size=(MOST_PIXELS // 6000 + 1, 6000)), "6000 x 5593 pixels; at most"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case):
    data, message = case
    with pytest.raises(UserError, match=message):
        survey(data, VISION, MEDIA, None)
