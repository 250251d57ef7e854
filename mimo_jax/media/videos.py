"""Videos as files hold them, decoded within limits: once to see what there is, and again, pair by pair, to be shown."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from mimo_jax.config.towers import MediaConfig, VisionConfig
from mimo_jax.errors import UserError, one_line
from mimo_jax.media.frames import chosen_frames, frame_pixels
from mimo_jax.media.images import MOST_PIXELS
from mimo_jax.media.pixels import Patches, in_patches, resized, target_size
from mimo_jax.media.recordings import MOST_SECONDS, mixed

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

MOST_BYTES = 50_000_000
MOST_SAMPLES = 4 * MOST_SECONDS * 48_000  # of sound, all channels


@dataclasses.dataclass(frozen=True, eq=False)
class Film:
    """A video in a file's bytes: which of its frames are shown, at which size, and its sound."""

    data: bytes
    where: str
    fps: float
    total: int  # frames
    chosen: tuple[int, ...]
    height: int  # of a frame as it is shown, in pixels
    width: int
    samples_S: Float[np.ndarray, "S"] | None

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.total / self.fps

    def seconds(self, config: VisionConfig) -> list[float]:
        """When the first frame of each temporal patch is."""
        return [frame / self.fps for frame in self.chosen[:: config.temporal_patch]]

    def patches(self, config: VisionConfig) -> Iterator[Patches]:
        """One temporal patch after another. The last frame is repeated where it needs another."""
        with _opened(self.data, self.where) as container:
            wanted, shown = set(self.chosen), list[np.ndarray]()
            for index, frame in enumerate(_frames(container, self.where)):
                if index in wanted:
                    shown.append(resized(_pixels(frame)[None], self.height, self.width, config.resizing))
                if len(shown) == config.temporal_patch or (shown and index == self.chosen[-1]):
                    yield in_patches(np.concatenate(shown), config)
                    shown = []
                if index == self.chosen[-1]:
                    return


def survey(data: bytes, vision: VisionConfig, media: MediaConfig, rate: int | None, where: str = "video") -> Film:
    """What of a video is shown, and with a `rate` in Hz its sound.

    Raises UserError where it is no video, damaged, empty, or larger than `MOST_BYTES`, `images.MOST_PIXELS` (a frame)
    or `recordings.MOST_SECONDS`.
    """
    if len(data) > MOST_BYTES:
        raise UserError(f"{where}: {len(data)} bytes; at most {MOST_BYTES} are read")
    with _opened(data, where) as container:
        fps, total, tall, wide = _rate(container, where), 0, 0, 0
        for frame in _frames(container, where):
            if not total:
                tall, wide, _ = _pixels(frame).shape
            total += 1
            if total > fps * MOST_SECONDS:
                raise UserError(f"{where}: more than {MOST_SECONDS} seconds")
    if not total:
        raise UserError(f"{where}: holds no frame")
    chosen = chosen_frames(total, fps, media)
    most = frame_pixels(len(chosen), media)
    height, width = target_size(tall, wide, vision.token_side, media.video_min_pixels, most)
    samples_S = None
    if rate is not None:
        with _opened(data, where) as container:
            samples_S = _sound(container, rate, where)
    return Film(data, where, fps, total, tuple(chosen), height, width, samples_S)


@contextlib.contextmanager
def _opened(data: bytes, where: str) -> Iterator[InputContainer]:
    """Whatever FFmpeg says is one line."""
    try:
        import av
    except ImportError:
        raise UserError(f"{where}: videos need the `video` extra: pip install -e '.[video]'") from None
    try:
        with av.open(io.BytesIO(data), "r") as container:
            yield container
    except UserError:
        raise
    except Exception as error:  # PyAV derives FFmpeg's errors from OSError, ValueError and others
        raise UserError(f"{where}: not a video that is read ({type(error).__name__}: {one_line(error)})") from None


def _rate(container: InputContainer, where: str) -> float:
    """Frames a second."""
    if not container.streams.video:
        raise UserError(f"{where}: holds no frame")
    stream = container.streams.video[0]
    _check_size(stream.codec_context.width, stream.codec_context.height, where)
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    if not fps > 0:
        raise UserError(f"{where}: {fps:g} frames a second; expected more than none")
    return fps


def _frames(container: InputContainer, where: str) -> Iterator[VideoFrame]:
    container.streams.video[0].thread_type = "NONE"  # threads of a damaged video outlive it
    for frame in container.decode(video=0):
        _check_size(frame.width, frame.height, where)  # which may change on the way
        yield frame


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(f"{where}: {width} x {height} pixels; at most {MOST_PIXELS} are decoded")


def _pixels(frame: VideoFrame) -> Float[np.ndarray, "H W 3"]:
    """As it is to be looked at: files may say that it lies on its side."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90).astype(np.float32)


def _sound(container: InputContainer, rate: int, where: str) -> Float[np.ndarray, "S"] | None:
    """Samples at `rate` Hz, all channels as one; None without a track, or of one that is empty."""
    if not container.streams.audio:
        return None
    import av

    stream = container.streams.audio[0]
    planar = av.AudioResampler(format="fltp")  # of the track's own rate and channels
    pieces, count = list[np.ndarray](), 0
    for frame in container.decode(stream):
        for piece in planar.resample(frame):
            pieces.append(piece.to_ndarray())
            count += pieces[-1].size
        if count > MOST_SAMPLES:
            raise UserError(f"{where}: more than {MOST_SAMPLES} samples of sound")
    return mixed(np.concatenate(pieces, axis=1).T, stream.rate, rate) if pieces else None
