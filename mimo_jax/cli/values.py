"""What the value of an option may be, as types of argparse: refused while arguments are read, before any work."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from mimo_jax.errors import LARGEST, UserError, check_real, check_whole

SEED = 2**32 - 1  # the last one
HOTTEST = 100.0  # temperature: far beyond it, every token is as likely


def whole(lowest: int, highest: int = LARGEST) -> Callable[[str], int]:
    """A whole number in `lowest`..`highest`."""
    return _number(int, check_whole, lowest, highest)


def real(lowest: float, highest: float) -> Callable[[str], float]:
    """A number in `lowest`..`highest`, so a finite one."""
    return _number(float, check_real, lowest, highest)


def _number(kind, check, lowest, highest):
    def convert(text: str):
        value = text
        with contextlib.suppress(ValueError):
            value = kind(text)
        try:
            check("", lowest, highest, found=value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": found=")) from None
        return value

    return convert


def address(text: str) -> str:
    """HOST:PORT of a process."""
    found = re.fullmatch(r"\S+:(\d{1,5})", text)
    if found is None or not 1 <= int(found[1]) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} must be HOST:PORT, for example 10.0.0.1:1234")
    return text


def folder(text: str) -> Path:
    """A folder that exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return Path(text)


def output_file(text: str) -> Path:
    """A file to write, in a folder that exists and takes new files. No device: a rename would replace it."""
    path = Path(text)
    with _refusing(text):
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"{text!r} is no regular file; name a file to write")
        _try_to_write(path.parent, path.name)
    return path


def output_folder(text: str) -> Path:
    """A folder to write into, which may have to be made."""
    path = Path(text)
    with _refusing(text):
        _stat(path)
        _try_to_write(next(folder for folder in (path, *path.parents) if _stat(folder)), path.name)
    return path


def new_folder(text: str) -> Path:
    """A folder to make."""
    if os.path.lexists(text):
        raise argparse.ArgumentTypeError(f"{text!r} exists; name a new folder")
    return output_folder(text)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _try_to_write(folder: Path, name: str) -> None:
    """What the work will do at its end: a temporary neighbour of a longer name."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", suffix=".tmp"):
        pass


@contextlib.contextmanager
def _refusing(text: str):
    try:
        yield
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from None
