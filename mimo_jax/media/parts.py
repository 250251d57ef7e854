"""What may stand in a prompt beside text: a file's path, or its bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from mimo_jax.checkpoint.files.tensorfile import read_bytes

Source = str | Path | bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """`source` is the path of a file, or what is in it; errors call it by `name`. `tower` is the field of a model's
    config that reads such parts.
    """

    tower: ClassVar[str]
    source: Source
    name: str = ""

    @property
    def where(self) -> str:
        return self.name or (type(self).__name__.lower() if isinstance(self.source, bytes) else str(self.source))

    def content(self, most: int) -> bytes:
        """The file, of at most `most` bytes."""
        return self.source if isinstance(self.source, bytes) else read_bytes(Path(self.source), most)


class Image(Part):
    """A picture: PNG, JPEG or WebP."""

    tower = "vision"


class Audio(Part):
    """A recording, in any format that libsndfile reads: WAV, FLAC, Ogg, MP3."""

    tower = "audio"


class Video(Part):
    """A video, in any format that FFmpeg reads. Its sound is heard where the model has an audio tower."""

    tower = "vision"
