"""Files appear complete or not at all, and a place has one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimo_jax.errors import UserError


def sync_directory(path: Path) -> None:
    """Makes renames within `path` survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(lock: Path, busy: str) -> Iterator[None]:
    """Holds the lock file `lock` until the block ends; where another process holds it, `busy` is the error.

    The system takes a lock from a process that dies, however it dies, so a lock file that can be locked is a leftover.
    """
    try:
        descriptor = _locked(lock)
    except OSError as error:
        raise UserError(f"{lock}: could not be locked ({error.strerror})") from None
    if descriptor is None:
        raise UserError(busy)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(lock: Path) -> int | None:
    """The open lock file, or None where another process holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        if not _try_lock(descriptor):
            os.close(descriptor)
            return None
        if _is_at(descriptor, lock):
            return descriptor
        os.close(descriptor)  # its holder removed it after it was opened here


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one called `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary neighbour, syncs, renames. A full disk is a one-line error and leaves nothing behind.

    What killed writers of `path` left goes away; the neighbour of a living one is locked, and stays.
    """
    try:
        _remove_abandoned(path)
        descriptor, name = _locked_neighbour(path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror})") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        sync_directory(path.parent)
    except OSError as error:
        name.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({error.strerror})") from None


def _locked_neighbour(path: Path) -> tuple[int, Path]:
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        if _try_lock(descriptor) and _is_at(descriptor, Path(name)):
            return descriptor, Path(name)
        os.close(descriptor)  # another writer took it for a leftover, before it was locked


def _remove_abandoned(path: Path) -> None:
    prefix = f".{path.name}."
    for name in os.listdir(path.parent):
        if not (name.startswith(prefix) and name.endswith(".tmp")):
            continue
        with contextlib.suppress(OSError):  # gone, or not ours to touch
            descriptor = os.open(path.parent / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            if _try_lock(descriptor):
                (path.parent / name).unlink(missing_ok=True)
            os.close(descriptor)
