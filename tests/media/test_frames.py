"""Frames of a video by the published rule, and how the prompt names their time."""

import dataclasses

import pytest

from mimo_jax.config.presets import preset
from mimo_jax.errors import UserError
from mimo_jax.media.frames import chosen_frames, frame_pixels, time_stamp

CONFIG = preset("mimo-v2.5").media


def test_a_frame_a_second_spread_evenly():
    """600 frames at 30 a second: 20 of them, from the first to the last; few seconds still give eight; never odd."""
    assert chosen_frames(600, 30, CONFIG) == [int(599 * place / 19) for place in range(20)]
    assert len(chosen_frames(60, 30, CONFIG)) == 8
    assert len(chosen_frames(630, 30, CONFIG)) == 20
    assert chosen_frames(5, 30, CONFIG) == [0, 1, 2, 4]
    assert chosen_frames(2, 30, CONFIG) == [0, 1] and chosen_frames(1, 30, CONFIG) == [0]
    assert len(chosen_frames(10**6, 1, dataclasses.replace(CONFIG, max_frames=101))) == 100


def test_a_video_without_frames_is_refused():
    with pytest.raises(UserError, match="video: 0 frames"):
        chosen_frames(0, 30, CONFIG)


def test_many_frames_are_smaller():
    """All frames together have a limit, and each has two."""
    assert frame_pixels(8, CONFIG) == 8_388_608
    assert frame_pixels(3600, CONFIG) == 268_435_456 * 2 // 3600
    assert frame_pixels(10**6, CONFIG) == 8192


def test_time_stamps_count_minutes_without_end():
    assert [time_stamp(seconds) for seconds in (0, 59.99, 65, 6000)] == ["00:00", "00:59", "01:05", "100:00"]
