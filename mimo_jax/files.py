"""Files appear complete or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mimo_jax.errors import UserError


def sync_directory(path: Path) -> None:
    """Makes renames within `path` survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary neighbour, syncs, renames. A full disk is a one-line error and leaves nothing behind."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        sync_directory(path.parent)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({error.strerror})") from None
