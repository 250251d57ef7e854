"""Mutates pictures, recordings and videos and decodes them: only a `UserError` or a part is allowed.

    python -m tests.tools.fuzz_media --count 100000 --seed 7

Decoders are written in C: a crash ends the process, whose last line tells the case. `--first N --count 1` repeats it.
"""

from __future__ import annotations

import faulthandler
import io
import json
import random
import sys
import time
from collections import Counter

import numpy as np
import soundfile
from PIL import Image as Picture

from mimo_jax.cli.memory import peak_memory
from mimo_jax.errors import UserError
from mimo_jax.media.parts import Audio, Image, Part, Video
from mimo_jax.media.towers import Towers, show
from mimo_jax.media.videos import survey
from tests.media.models import CONFIG, MEDIA, TOKENIZER, VISION, mp4, png, wav
from tests.tools.fuzz import arguments, mutate_bytes

SECONDS, HANG_SECONDS = 5.0, 60
MEMORY_BYTES = 1 << 28  # beyond what the files as they are take


def samples() -> dict[str, tuple[type[Part], bytes]]:
    """A file of every format that is taken."""
    found: dict[str, tuple[type[Part], bytes]] = {"png": (Image, png()), "video": (Video, mp4(sound=wav(2.0)))}
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    blank = Picture.new("RGB", (56, 40))
    pictures = {
        "grey16": (Picture.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        "palette": (Picture.fromarray(pixels).convert("P"), "PNG", {}),
        "cmyk": (Picture.fromarray(pixels).convert("CMYK"), "JPEG", {}),
        "progressive": (Picture.fromarray(pixels), "JPEG", {"progressive": True}),
        "webp": (Picture.fromarray(pixels).convert("RGBA"), "WEBP", {}),
        "animated": (Picture.fromarray(pixels), "WEBP", {"save_all": True, "append_images": [blank]}),
    }
    for name, (picture, form, options) in pictures.items():
        file = io.BytesIO()
        picture.save(file, form, **options)
        found[name] = Image, file.getvalue()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (4000, 2))
    for form in ("WAV", "FLAC", "OGG", "MP3"):
        file = io.BytesIO()
        soundfile.write(file, noise, 8000, format=form)
        found[form.lower()] = Audio, file.getvalue()
    return found


def run(count: int, seed: int = 0, first: int = 0) -> dict[str, float]:
    """Decodes `count` mutated files; the first that misbehaves is an AssertionError naming its number."""
    towers = Towers(CONFIG, {}, (TOKENIZER, {}))  # decoding needs no weights
    files, outcomes, slowest = samples(), Counter[str](), 0.0

    def decode(kind: type[Part], content: bytes) -> str:
        try:
            show(towers, kind(content), lambda text: [1])
            if kind is Video:  # whose frames are decoded again for the tower
                list(survey(content, VISION, MEDIA, None).patches(VISION))
        except UserError as error:
            assert "\n" not in str(error), f"not one line: {error}"
            return "rejected"
        return "accepted"

    assert {decode(*file) for file in files.values()} == {"accepted"}
    before = peak_memory()
    for case in range(first, first + count):
        rng = random.Random(f"{seed}/{case}")
        name = rng.choice(list(files))
        kind, content = files[name]
        print(case, name, end="\r", flush=True, file=sys.stderr)
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        began = time.process_time()
        outcomes[f"{name} {decode(kind, mutate_bytes(rng, content))}"] += 1
        faulthandler.cancel_dump_traceback_later()
        seconds, grown = time.process_time() - began, peak_memory() - before
        slowest = max(slowest, seconds)
        assert seconds < SECONDS, f"case {case} of seed {seed} ({name}): {seconds:.2f} s"
        assert grown < MEMORY_BYTES, f"case {case} of seed {seed} ({name}): {grown} bytes"
    grown = peak_memory() - before
    return {**dict(sorted(outcomes.items())), "slowest_seconds": round(slowest, 3), "largest_growth": grown}


def main() -> None:
    args = arguments(__doc__)
    print(json.dumps({"cases": args.count, **run(args.count, args.seed, args.first)}))


if __name__ == "__main__":
    main()
