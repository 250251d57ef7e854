"""Directories that appear complete or not at all, and the manifest that proves them.

`manifest.json` is written last. It lists every file with its size and SHA-256, every tensor with its own, and ends with
the digest of itself; its bytes must be the canonical spelling of its content, so that no flipped bit goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimo_jax.checkpoint.tensorfile import load_json, open_regular, read_bytes
from mimo_jax.errors import UserError
from mimo_jax.files import sync_directory

MANIFEST = "manifest.json"
FORMAT = "mimo_jax checkpoint 1"
_MAX_BYTES = 1 << 28
_CHUNK = 1 << 20


@contextmanager
def new_directory(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty neighbour of `destination` that takes its place when the block ends well.

    A block that fails leaves nothing; one that is killed leaves a hidden neighbour, which the next attempt removes.
    A directory being replaced stays where it is until the new one is complete.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    replaced = destination.with_name(f".{destination.name}.replaced")
    try:
        if replaced.exists() and not destination.exists():
            replaced.rename(destination)  # killed between the two renames below
        if destination.exists() and not overwrite:
            raise UserError(f"{destination}: already exists; give --overwrite to replace it")
        for leftover in (partial, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _sync_tree(partial)
        if destination.exists():
            destination.rename(replaced)
        partial.rename(destination)
        sync_directory(destination.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
        raise UserError(f"{destination}: could not be written ({reason})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))


def write_file(path: Path, data: bytes) -> None:
    """A small file inside a directory that is being built."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def write_manifest(directory: Path, kind: str, tensors: dict[str, str], advance: Callable[[int], None]) -> None:
    """Describes every file of `directory`; `tensors` maps a tensor's name to its SHA-256."""
    files = {name: _file_entry(directory / name, advance) for name in list_files(directory)}
    values = {"format": FORMAT, "kind": kind, "files": files, "tensors": tensors}
    write_file(directory / MANIFEST, _canonical(values))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, after checking it against its own digest and spelling. A directory without one is not complete."""
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{path}: not found; an incomplete conversion, or not written by convert.py")
    data = read_bytes(path, _MAX_BYTES)
    values = load_json(data, str(path))
    values.pop("sha256", None)
    if _canonical(values) != data:
        raise UserError(f"{path}: damaged: it does not match its own SHA-256")
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: format is {values.get('format')!r}, expected {FORMAT!r}")
    return values


def verify_files(directory: Path, manifest: dict[str, Any], advance: Callable[[int], None]) -> None:
    """Compares every file with the manifest; the first that differs is the error."""
    expected, found = manifest["files"], list_files(directory)
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    if missing or extra:
        what = [f"{name} is missing" for name in missing[:3]] + [f"{name} is not in the manifest" for name in extra[:3]]
        raise UserError(f"{directory}: {'; '.join(what)}")
    for name in found:
        if _file_entry(directory / name, advance) != expected[name]:
            raise UserError(f"{directory / name}: damaged: size or SHA-256 differs from {MANIFEST}")


def list_files(directory: Path) -> list[str]:
    """Relative names of all files but the manifest. Links, FIFOs and devices are errors."""
    names = []
    for folder, folders, files in os.walk(directory):
        for name in [*folders, *files]:
            path = Path(folder) / name
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise UserError(f"{path}: neither a regular file nor a directory")
        names += [(Path(folder) / name).relative_to(directory).as_posix() for name in files]
    return sorted(name for name in names if name != MANIFEST)


def _file_entry(path: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            advance(len(chunk))
    return {"bytes": size, "sha256": digest.hexdigest()}


def _canonical(values: dict[str, Any]) -> bytes:
    body = json.dumps(values, indent=1, sort_keys=True)
    return json.dumps(
        {**values, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1, sort_keys=True
    ).encode()
