"""Which frames of a video are read, when they are, and how the prompt says so."""

from __future__ import annotations

import numpy as np

from mimo_jax.config.towers import MediaConfig
from mimo_jax.errors import UserError

FEWEST = 8  # frames of a video that has them


def chosen_frames(total: int, source_fps: float, config: MediaConfig) -> list[int]:
    """Of `total` frames at `source_fps`: `config.fps` of them a second, spread evenly over the video."""
    if total < 1 or not source_fps > 0:
        raise UserError(f"video: {total} frames at {source_fps} a second; expected at least one")
    wanted = max(total / source_fps * config.fps, FEWEST)
    count = int(min(min(wanted, config.max_frames // 2 * 2), total)) // 2 * 2
    count = min(max(count, 2), total)
    return list(dict.fromkeys(np.linspace(0, total - 1, count).astype(int).tolist()))


def frame_pixels(count: int, config: MediaConfig) -> int:
    """How many pixels each of `count` frames may have."""
    return max(config.video_min_pixels, min(config.video_total_pixels * 2 // count, config.video_max_pixels))


def time_stamp(seconds: float) -> str:
    """Minutes and seconds, as the prompt names a frame: "01:05"."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"
