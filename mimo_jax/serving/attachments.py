"""Parts of a message that are no text, as OpenAI's chat API has them: images, recordings and videos.

Nothing is fetched: content comes in the request itself, or from files below a folder that was named at the start.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mimo_jax.config.model import ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.media.parts import Audio, Image, Part, Source, Video

MOST = 32  # in a conversation


@dataclasses.dataclass(frozen=True)
class Attachments:
    """What a model takes beside text: types of parts. `files` is the folder below which files may be named."""

    kinds: tuple[str, ...] = ()
    files: Path | None = None

    @classmethod
    def of(cls, config: ModelConfig, files: Path | None) -> Attachments:
        return cls(tuple(kind for kind, (make, _) in KINDS.items() if getattr(config, make.tower) is not None), files)

    def part(self, value: Mapping[str, Any], where: str) -> Part:
        """Of a part of one of the `kinds`."""
        kind = value["type"]
        make, key = KINDS[kind]
        table = value.get(kind)
        if not isinstance(table, Mapping) or not isinstance(table.get(key), str):
            raise UserError(f"{where}.{kind}={reprlib.repr(table)} must be an object with a string {key!r}")
        where = f"{where}.{kind}.{key}"
        return make(self._source(table[key], where, is_plain=key == "data"), where)

    def _source(self, text: str, where: str, is_plain: bool) -> Source:
        scheme, colon, rest = text.partition(":")
        if is_plain and not colon:
            return _decoded(text, where)
        match scheme.lower():
            case "data":
                head, comma, data = rest.partition(",")
                if not comma or not head.lower().endswith(";base64"):
                    raise UserError(f"{where}: a data: URL must be in base64, as data:image/png;base64,...")
                return _decoded(data, where)
            case "file":
                return self._file(unquote(urlsplit(text).path), where)
        raise UserError(f"{where}={reprlib.repr(text)} must be a data: URL; nothing is fetched from elsewhere")

    def _file(self, path: str, where: str) -> Path:
        if self.files is None:
            raise UserError(f"{where}: this server reads no files; it was started without --media-files")
        found = (self.files / path).resolve()
        if not found.is_relative_to(self.files.resolve()):
            raise UserError(f"{where}: the file is not below the folder that --media-files names")
        return found


TEXT_ALONE = Attachments()


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{where}: not valid base64") from None


# By a part's type: what it becomes, and where its content is.
KINDS: dict[str, tuple[type[Part], str]] = {
    "image_url": (Image, "url"),
    "input_audio": (Audio, "data"),
    "video_url": (Video, "url"),
}
