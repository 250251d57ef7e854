"""Pictures as files hold them, decoded within limits: header first, pixels only if they fit."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from mimo_jax.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_BYTES = 10_000_000
MOST_PIXELS = 4 * 8_388_608  # in the header: four times what the tower is shown
_WHITE = (255, 255, 255, 255)


def decode(data: bytes, where: str = "image") -> Float[np.ndarray, "H W 3"]:
    """RGB in 0..255 of a PNG, JPEG or WebP: turned as EXIF says, on white where it is transparent, the first frame.

    Raises UserError where it is none of them, damaged, or larger than `MOST_BYTES` or `MOST_PIXELS`.
    """
    if len(data) > MOST_BYTES:
        raise UserError(f"{where}: {len(data)} bytes; at most {MOST_BYTES} are read")
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError(f"{where}: pictures need the `media` extra: pip install -e '.[media]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are refused below, and of odd metadata
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise UserError(f"{where}: {width} x {height} pixels; at most {MOST_PIXELS} are decoded")
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{where}: too many pixels; at most {MOST_PIXELS} are decoded") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{where}: not a picture that is read; expected {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ValueError ...
        raise UserError(f"{where}: a damaged picture ({type(error).__name__}: {one_line(error)})") from None


def _rgb(picture: Image.Image) -> Float[np.ndarray, "H W 3"]:
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        grey = np.asarray(picture).astype(np.float32) * np.float32(255 / 65_535)
        return np.repeat(np.clip(grey, 0, 255)[..., None], 3, axis=-1)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        from PIL import Image

        clear = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", clear.size, _WHITE), clear)
    return np.asarray(picture.convert("RGB")).astype(np.float32)
