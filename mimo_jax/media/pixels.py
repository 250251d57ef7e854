"""From pixels to patches: the size a picture is read at, its resizing, and the order in which patches lie.

Numbers are those of Xiaomi's own serving code (SGLang's processor of MiMo-V2): bilinear without antialiasing, in
float32 and without rounding to 8 bits, then CLIP's statistics. Hugging Face's processor of Qwen2-VL, which other
engines use, is bicubic with antialiasing, in 8 bits.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from mimo_jax.config.towers import VisionConfig
from mimo_jax.errors import UserError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MOST_STRETCHED = 200  # long side over short


@dataclasses.dataclass(frozen=True)
class Patches:
    """An image or a video as the tower takes it: F temporal patches of `rows` x `columns` patches."""

    values_FSP: Float[np.ndarray, "F S P"]
    rows: int
    columns: int

    def tokens(self, merge: int) -> int:
        """Rows of the text model for each temporal patch."""
        return self.rows * self.columns // merge**2


def target_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Multiples of `factor`, `least` to `most` pixels in all, in about the proportions of the picture."""
    if min(height, width) < factor:
        scale = factor / min(height, width)
        height, width = round(height * scale), round(width * scale)
    elif max(height, width) / min(height, width) > MOST_STRETCHED:
        raise UserError(f"image: {width} x {height} pixels; one side may be at most {MOST_STRETCHED} times the other")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > most:
        scale = math.sqrt(height * width / most)
        tall, wide = (math.floor(side / scale / factor) * factor for side in (height, width))
    elif tall * wide < least:
        scale = math.sqrt(least / (height * width))
        tall, wide = (math.ceil(side * scale / factor) * factor for side in (height, width))
    if not tall or not wide:
        raise UserError(f"image: {width} x {height} pixels are too long and thin for a limit of {most} pixels")
    return tall, wide


def resized(
    pixels_THWC: Float[np.ndarray, "T H W 3"], height: int, width: int, resizing: str = "bilinear"
) -> Float[np.ndarray, "T I J 3"]:
    """Frames with channels in 0..255 at another size, by one of `RESIZERS`."""
    return RESIZERS[resizing](pixels_THWC.astype(np.float32), height, width)


def _bicubic(pixels_THWC: Float[np.ndarray, "T H W 3"], height: int, width: int) -> Float[np.ndarray, "T I J 3"]:
    """Pillow's."""
    from PIL import Image

    def one(pixels_HWC: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.rint(pixels_HWC).clip(0, 255).astype(np.uint8))
        return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float32)

    return np.stack([one(frame) for frame in pixels_THWC])


def _bilinear(pixels_THWC: Float[np.ndarray, "T H W 3"], height: int, width: int) -> Float[np.ndarray, "T I J 3"]:
    """With half-pixel centres, edges held, and no antialiasing."""
    rows_TIWC = _between(pixels_THWC, height, axis=1)
    return _between(rows_TIWC, width, axis=2)


def _between(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    held = values.shape[axis]
    place = np.maximum((np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(held / size) - 0.5, 0)
    low = np.minimum(place.astype(np.int64), held - 1)
    high = np.minimum(low + 1, held - 1)
    shape = [1] * values.ndim
    shape[axis] = size
    share = (place - low).astype(np.float32).reshape(shape)
    return np.take(values, low, axis) * (1 - share) + np.take(values, high, axis) * share


RESIZERS = {"bilinear": _bilinear, "bicubic": _bicubic}


def patches_of(pixels_THWC: Float[np.ndarray, "T H W 3"], config: VisionConfig, least: int, most: int) -> Patches:
    """T frames with channels in 0..255, resized to `least` to `most` pixels each."""
    _, tall, wide, _ = pixels_THWC.shape
    height, width = target_size(tall, wide, config.token_side, least, most)
    return in_patches(resized(pixels_THWC, height, width, config.resizing), config)


def in_patches(pixels_THWC: Float[np.ndarray, "T H W 3"], config: VisionConfig) -> Patches:
    """T frames with channels in 0..255. The last one is repeated where a temporal patch needs another."""
    patch, merge, frames = config.patch, config.merge, config.temporal_patch
    missing = -len(pixels_THWC) % frames
    pixels = (pixels_THWC - 255 * MEAN) / (255 * STD)
    pixels = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
    rows, columns = (side // patch for side in pixels.shape[1:3])
    cut = pixels.reshape(-1, frames, rows // merge, merge, patch, columns // merge, merge, patch, 3)
    # Frame, block, patch in its block; then channel, frame, row and column in the patch.
    ordered = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return Patches(ordered.reshape(len(ordered), rows * columns, config.patch_values), rows, columns)
