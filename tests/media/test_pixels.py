"""Pictures become patches: sizes, resizing, order, and what every kind of file decodes to."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mimo_jax.config.towers import VisionConfig
from mimo_jax.errors import UserError
from mimo_jax.media import images
from mimo_jax.media.images import decode
from mimo_jax.media.pixels import MEAN, STD, patches_of, resized, target_size

CONFIG = VisionConfig(24, (-1, 0, 1))
LIMITS = (8192, 8_388_608)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 60, 3), np.uint8)


def saved(picture: Image.Image, name: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, name, **options)
    return file.getvalue()


# By the rule of SGLang's processor, worked out by hand: sides to multiples of 32 (halves to even), then within limits.
@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (480, 640)),
        (479, 641, (480, 640)),
        (48, 80, (96, 128)),  # 1.5 and 2.5 blocks both go to two; 4,096 pixels are fewer than 8,192
        (7, 1300, (32, 5952)),
        (1, 1, (96, 96)),
        (4000, 4000, (2880, 2880)),
        (64, 12_800, (64, 12_800)),
    ],
)
def test_sizes_are_the_references(height, width, expected):
    """Rounded sides, the short side's own branch, both limits."""
    assert target_size(height, width, 32, *LIMITS) == expected


def test_a_ribbon_is_refused():
    """Two hundred to one is the most."""
    with pytest.raises(UserError, match="12801 x 64 pixels; one side may be at most 200 times the other"):
        target_size(64, 12_801, 32, *LIMITS)
    with pytest.raises(UserError, match="too long and thin"):
        target_size(1, 10_000, 32, *LIMITS)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (17, 5), (40, 60), (160, 33)])
def test_resizing_is_torchs_bilinear(size):
    """Within 1e-5 of the value range, up and down."""
    given = torch.tensor(PIXELS).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(given, size, mode="bilinear", align_corners=False, antialias=False)
    found = resized(PIXELS[None].astype(np.float32), *size)
    np.testing.assert_allclose(found[0], expected[0].permute(1, 2, 0), atol=255e-5 / 4)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (17, 5), (40, 60), (160, 33)])
def test_bicubic_resizing_is_torchs(size):
    """With antialiasing; Pillow rounds to 8 bits after each axis, and cuts off what leaves them."""
    grey = 96 + PIXELS // 4
    given = torch.tensor(grey).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(given, size, mode="bicubic", align_corners=False, antialias=True)
    found = resized(grey[None].astype(np.float32), *size, resizing="bicubic")
    np.testing.assert_allclose(found[0], expected[0].clip(0, 255).permute(1, 2, 0), atol=1.5)


def test_patches_lie_block_by_block():
    """A patch holds channel, frame, row, column; four patches of a token follow each other."""
    pixels = RNG.uniform(0, 255, (1, 96, 128, 3)).astype(np.float32)
    found = patches_of(pixels, CONFIG, *LIMITS)
    assert (found.rows, found.columns, found.tokens(2), found.values_FSP.shape) == (6, 8, 12, (1, 48, 1536))
    normed = (pixels[0] / 255 - MEAN) / STD
    sequence = [
        (2 * block_row + row, 2 * block_column + column)
        for block_row in range(3)
        for block_column in range(4)
        for row in range(2)
        for column in range(2)
    ]
    for place, (row, column) in enumerate(sequence):
        piece = normed[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].transpose(2, 0, 1)
        expected = np.repeat(piece[:, None], 2, axis=1)  # an image is two equal frames
        np.testing.assert_allclose(found.values_FSP[0, place].reshape(3, 2, 16, 16), expected, atol=1e-5)


def test_every_kind_of_picture_decodes():
    """Grey, palette, 1 bit, 16 bits, CMYK, transparency on white, the first frame of several, EXIF's turns."""
    rgb = Image.fromarray(PIXELS)
    np.testing.assert_array_equal(decode(saved(rgb)), PIXELS)
    np.testing.assert_array_equal(decode(saved(rgb, "WEBP", lossless=True)), PIXELS)
    assert np.abs(decode(saved(rgb.resize((600, 400)), "JPEG", quality=95)).mean() - PIXELS.mean()) < 2
    grey = rgb.convert("L")
    np.testing.assert_array_equal(decode(saved(grey)), np.repeat(np.asarray(grey)[..., None], 3, -1))
    palette = rgb.quantize(16)
    np.testing.assert_array_equal(decode(saved(palette)), np.asarray(palette.convert("RGB")))
    assert set(np.unique(decode(saved(rgb.convert("1"))))) == {0, 255}
    deep = (np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60)
    np.testing.assert_allclose(decode(saved(Image.fromarray(deep)))[..., 1], deep / 257, atol=1e-3)
    assert decode(saved(rgb.convert("CMYK"), "JPEG")).shape == (40, 60, 3)
    half = rgb.convert("RGBA")
    half.putalpha(128)
    np.testing.assert_allclose(decode(saved(half)), PIXELS * (128 / 255) + 127, atol=1.5)
    clear = Image.new("RGBA", (3, 3), (9, 9, 9, 0))
    assert (decode(saved(clear)) == 255).all()
    moving = saved(rgb, "WEBP", save_all=True, append_images=[Image.new("RGB", rgb.size)], lossless=True)
    np.testing.assert_array_equal(decode(moving), PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    np.testing.assert_array_equal(decode(saved(rgb, exif=exif)), np.rot90(PIXELS, -1))


def test_what_cannot_be_read_is_named(monkeypatch):
    """Truncated, mislabelled, bombs, other formats: one line each."""
    whole = saved(Image.fromarray(PIXELS))
    for data in (whole[:-40], whole[:60], b"", b"GIF89a", saved(Image.fromarray(PIXELS), "GIF"), b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(UserError, match=r"^a\.png: (a damaged picture|not a picture)"):
            decode(data, "a.png")
    bomb = saved(Image.new("1", (40_000, 40_000)))
    with pytest.raises(UserError, match="pixels; at most"):
        decode(bomb)
    monkeypatch.setattr(images, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="bytes; at most 100 are read"):
        decode(whole)
