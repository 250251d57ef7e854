"""What stands in front of the text model: the vision tower, the encoder of audio codes, and what makes those codes.

Sizes are element counts. Values of the published models: `presets`. None of it is ever quantised.
"""

from __future__ import annotations

import dataclasses

from mimo_jax.config.numbers import fits_devices
from mimo_jax.errors import UserError

FULL, BY_ROWS, BY_COLUMNS = -1, 0, 1  # what a block attends to, and in which order its window runs
SINKS = ("denominator", "first key")
RESIZING = ("bilinear", "bicubic")


def _check(where: str, config: object, fields: tuple[str, ...]) -> None:
    for field in fields:
        value = getattr(config, field)
        if not fits_devices(value) or (type(value) is not int and not field.endswith(("eps", "theta"))):
            raise UserError(f"{where}: {field}={value!r} must be a positive number, whole if it counts something")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Geometry of the vision tower. Patches of `temporal_patch` frames; 2 x 2 of them become one token of the text."""

    out_size: int  # the text model's hidden size
    windows: tuple[int, ...]  # per block: FULL, or the order in which `window` neighbours on each side are seen
    hidden_size: int = 1280
    intermediate_size: int = 4608
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 64
    channels: int = 3
    patch: int = 16  # pixels
    temporal_patch: int = 2  # frames
    merge: int = 2  # patches on each side of a token
    window: int = 64  # patches of the sequence, to each side
    has_sink: bool = True  # on blocks with a window
    # What no published file says, and implementations disagree about.
    sink: str = "denominator"  # or "first key", see `modeling.vision`
    resizing: str = "bilinear"  # of pictures, as Xiaomi's serving code does; or "bicubic", see `media.pixels`
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    init_range: float = 0.02

    def __post_init__(self) -> None:
        _check("vision", self, _VISION_NUMBERS)
        if not self.windows or not all(window in (FULL, BY_ROWS, BY_COLUMNS) for window in self.windows):
            raise UserError(f"vision: windows={self.windows!r} must hold one of -1, 0 and 1 for each block")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"vision: num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 4:
            raise UserError(f"vision: head_dim={self.head_dim} must be a multiple of 4: rows and columns are rotated")
        if self.sink not in SINKS:
            raise UserError(f"vision: sink={self.sink!r} must be one of {', '.join(SINKS)}")
        if self.resizing not in RESIZING:
            raise UserError(f"vision: resizing={self.resizing!r} must be one of {', '.join(RESIZING)}")

    @property
    def depth(self) -> int:
        return len(self.windows)

    @property
    def full_blocks(self) -> list[int]:
        """Blocks without a window."""
        return [index for index, window in enumerate(self.windows) if window == FULL]

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: channels x frames x rows x columns."""
        return self.channels * self.temporal_patch * self.patch * self.patch

    @property
    def token_side(self) -> int:
        """Pixels on each side of a token."""
        return self.patch * self.merge

    @property
    def merged_size(self) -> int:
        """Width of the patches of a token side by side."""
        return self.merge * self.merge * self.hidden_size


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """Geometry of what turns audio codes into tokens: 25 Hz frames of `channels` codes, `group` of them to a token."""

    out_size: int
    channels: int = 20
    group: int = 4  # frames
    segment: int = 6000  # mel frames that are encoded together
    hidden_size: int = 1024
    num_layers: int = 6
    num_heads: int = 16
    intermediate_size: int = 4096
    codes: int = 1280  # rows of each channel's embedding
    projection_ratio: int = 4  # the projection's inner width in widths of a group
    norm_eps: float = 1e-6
    rope_theta: float = 640_000.0
    init_range: float = 0.02

    def __post_init__(self) -> None:
        _check("audio", self, _AUDIO_NUMBERS)
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"audio: hidden_size={self.hidden_size} must be a multiple of twice num_heads={self.num_heads}"
            )

    @property
    def group_size(self) -> int:
        """Width of the frames of a token side by side."""
        return self.group * self.hidden_size


@dataclasses.dataclass(frozen=True)
class AudioTokenizerConfig:
    """Geometry of the encoder that makes codes of a log-mel spectrogram, in the folder `audio_tokenizer/`."""

    codebooks: tuple[int, ...] = (1024, 1024, 256, *(128,) * 17)  # entries of each channel's
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    skip_layer: int = 3  # whose output is added at the end, counted from one
    window: int = 128  # places before its own that a layer with a window sees
    window_every: int = 2  # such are the first of so many layers; the others see all before them
    mels: int = 128
    sample_rate: int = 24_000
    window_samples: int = 960  # of the Fourier transform, too
    hop: int = 240
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    init_range: float = 0.02

    def __post_init__(self) -> None:
        _check("audio tokenizer", self, _TOKENIZER_NUMBERS)
        if not self.codebooks or not all(type(size) is int and 1 <= size < 2**16 for size in self.codebooks):
            raise UserError(f"audio tokenizer: codebooks={self.codebooks!r} must hold the sizes of one or more")
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(f"audio tokenizer: hidden_size={self.hidden_size} must be a multiple of 2 x num_heads")
        if not self.skip_layer <= self.num_layers:
            raise UserError(
                f"audio tokenizer: skip_layer={self.skip_layer} must be at most num_layers={self.num_layers}"
            )

    def has_window(self, layer: int) -> bool:
        return layer % self.window_every == 0


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """What a prompt says of media, and how large they may be: token ids, pixels, frames per second."""

    image_token: int  # stands for each row of an image
    video_token: int
    audio_token: int
    vision_start: int
    vision_end: int
    video_start: int
    video_end: int
    audio_start: int
    audio_end: int
    image_min_pixels: int = 8192
    image_max_pixels: int = 8_388_608
    video_min_pixels: int = 8192
    video_max_pixels: int = 8_388_608  # of a frame
    video_total_pixels: int = 268_435_456
    fps: float = 1.0  # that frames are taken at
    max_frames: int = 3600

    def __post_init__(self) -> None:
        for field in MEDIA_TOKENS:
            if type(getattr(self, field)) is not int or getattr(self, field) < 0:
                raise UserError(f"media: {field}={getattr(self, field)!r} must be a token id")
        fields = [field.name for field in dataclasses.fields(self) if field.name not in MEDIA_TOKENS]
        for field in fields:
            if not fits_devices(getattr(self, field)):
                raise UserError(f"media: {field}={getattr(self, field)!r} must be a positive number")

    @property
    def rows(self) -> tuple[int, int, int]:
        """Ids that stand for rows of media."""
        return self.image_token, self.video_token, self.audio_token


MEDIA_TOKENS = (
    *("image_token", "video_token", "audio_token", "vision_start", "vision_end"),
    *("video_start", "video_end", "audio_start", "audio_end"),
)
_TOKENIZER_NUMBERS = (
    *("hidden_size", "num_layers", "num_heads", "intermediate_size", "skip_layer", "window", "window_every", "mels"),
    *("sample_rate", "window_samples", "hop", "norm_eps", "rope_theta"),
)
_VISION_NUMBERS = (
    *("out_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "channels", "patch"),
    *("temporal_patch", "merge", "window", "norm_eps", "rope_theta"),
)
_AUDIO_NUMBERS = (
    *("out_size", "channels", "group", "segment", "hidden_size", "num_layers", "num_heads", "intermediate_size"),
    *("codes", "projection_ratio", "norm_eps", "rope_theta"),
)
