"""Videos as files hold them, decoded within limits: frames that are read are kept, at the size they have then."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from mimo_jax.config.towers import MediaConfig, VisionConfig
from mimo_jax.errors import UserError
from mimo_jax.media.frames import chosen_frames, frame_pixels
from mimo_jax.media.images import MOST_PIXELS
from mimo_jax.media.pixels import Patches, in_patches, resized, target_size
from mimo_jax.media.recordings import MOST_SECONDS, mixed

if TYPE_CHECKING:
    from av.container import InputContainer

MOST_BYTES = 50_000_000
MOST_SAMPLES = 4 * MOST_SECONDS * 48_000  # of sound, all channels
MOST_KEPT = 1 << 28  # pixels of the frames that are kept, all together: 3 GB


@dataclasses.dataclass(frozen=True, eq=False)
class Film:
    """Frames as patches, when the first frame of each temporal patch is, how long all lasts, and its sound."""

    patches: Patches
    seconds: tuple[float, ...]
    duration: float
    samples_S: Float[np.ndarray, "S"] | None


def decode(data: bytes, vision: VisionConfig, media: MediaConfig, rate: int | None, where: str = "video") -> Film:
    """The frames that the model is shown, and with a `rate` in Hz the sound.

    Raises UserError where it is no video, damaged, empty, or larger than `MOST_BYTES`, `images.MOST_PIXELS` (a frame),
    `recordings.MOST_SECONDS` or `MOST_KEPT`.
    """
    if len(data) > MOST_BYTES:
        raise UserError(f"{where}: {len(data)} bytes; at most {MOST_BYTES} are read")
    try:
        import av
    except ImportError:
        raise UserError(f"{where}: videos need the `video` extra: pip install -e '.[video]'") from None
    try:
        with av.open(io.BytesIO(data), "r") as container:
            total, fps = _length(container, where)
        chosen = chosen_frames(total, fps, media)
        with av.open(io.BytesIO(data), "r") as container:
            pixels = list(_frames(container, chosen, vision, media, where))
        chosen = chosen[: len(pixels)]  # of a file that is cut short
        if not pixels:
            raise UserError(f"{where}: holds no frame")
        samples_S = None
        if rate is not None:
            with av.open(io.BytesIO(data), "r") as container:
                samples_S = _sound(container, rate, where)
    except UserError:
        raise
    except Exception as error:  # FFmpeg's errors, which PyAV derives from OSError, ValueError and others
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not a video that is read ({type(error).__name__}: {reason})") from None
    patches = in_patches(np.stack(pixels), vision)
    seconds = tuple(frame / fps for frame in chosen[:: vision.temporal_patch])
    return Film(patches, seconds, total / fps, samples_S)


def _length(container: InputContainer, where: str) -> tuple[int, float]:
    """Frames, counted without decoding them, and how many there are a second."""
    if not container.streams.video:
        raise UserError(f"{where}: holds no frame")
    stream = container.streams.video[0]
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MOST_PIXELS:
        raise UserError(f"{where}: {width} x {height} pixels; at most {MOST_PIXELS} are decoded")
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    total = sum(packet.size > 0 for packet in container.demux(stream))
    if not fps > 0 or not total:
        raise UserError(f"{where}: {total} frames at {fps:g} a second; expected at least one")
    if total > fps * MOST_SECONDS:
        raise UserError(f"{where}: {total / fps:.0f} seconds; at most {MOST_SECONDS} are read")
    return total, fps


def _frames(
    container: InputContainer, chosen: list[int], vision: VisionConfig, media: MediaConfig, where: str
) -> Iterator[Float[np.ndarray, "H W 3"]]:
    """The chosen ones, resized, each by itself: all frames of a video at once would need too much memory."""
    wanted, size = set(chosen), None
    container.streams.video[0].thread_type = "NONE"  # threads of a damaged video outlive it
    for index, frame in enumerate(container.decode(video=0)):
        if index in wanted:
            if frame.width * frame.height > MOST_PIXELS:  # which may change on the way
                raise UserError(f"{where}: {frame.width} x {frame.height} pixels; at most {MOST_PIXELS} are decoded")
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90).astype(np.float32)
            if size is None:
                (tall, wide, _), most = pixels.shape, frame_pixels(len(chosen), media)
                size = target_size(tall, wide, vision.patch * vision.merge, media.video_min_pixels, most)
                if size[0] * size[1] * len(chosen) > MOST_KEPT:
                    raise UserError(f"{where}: {len(chosen)} frames of {size[1]} x {size[0]} pixels are too many")
            yield resized(pixels[None], *size, vision.resizing)[0]
        if index >= chosen[-1]:
            return


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
