"""Directories that appear complete or not at all, and the manifest that proves them.

`manifest.json` is written last. It lists every file with its size and SHA-256, every tensor with its own, and ends with
the digest of itself; its bytes must be the canonical spelling of its content, so that no flipped bit goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimo_jax.checkpoint.files.tensorfile import load_json, open_regular, read_bytes
from mimo_jax.errors import UserError
from mimo_jax.files import sync_directory

MANIFEST = "manifest.json"
FORMAT = "mimo_jax checkpoint 1"
KINDS = ("huggingface", "orbax")
_MAX_BYTES = 1 << 28
_CHUNK = 1 << 20
_SMALL_BYTES = 1 << 16
_REMOVAL_TRIES, _SETTLED = 200, 5  # tries of 20 ms; so many in a row must find nothing


@contextmanager
def new_directory(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty neighbour of `destination` that takes its place when the block ends well.

    A block that fails leaves nothing; one that is killed leaves a hidden neighbour, which the next attempt removes.
    A directory being replaced stays where it is until the new one is complete.
    """
    destination = Path(os.path.abspath(destination))
    partial = destination.with_name(f".{destination.name}.partial")
    replaced = destination.with_name(f".{destination.name}.replaced")
    try:
        if replaced.exists() and not destination.exists():
            replaced.rename(destination)  # killed between the two renames below
        refuse_existing(destination, overwrite)
        remove_all((partial, replaced))
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _sync_tree(partial)
        if destination.exists():
            destination.rename(replaced)
        partial.rename(destination)
        sync_directory(destination.parent)
        remove_all((replaced,))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
        raise UserError(f"{destination}: could not be written ({reason})") from None
    finally:
        remove_all((partial,))


def refuse_existing(destination: Path, overwrite: bool) -> None:
    """Only what these converters wrote may be replaced, and only when asked to."""
    if not destination.exists() and not destination.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{destination}: already exists; give --overwrite to replace it")
    if destination.is_symlink() or not (destination / MANIFEST).is_file():
        raise UserError(f"{destination}: has no {MANIFEST}, so it is not a written checkpoint; not replaced")


def remove_all(paths: Iterable[Path]) -> None:
    """Removes directory trees, even while a failed writer's last threads still put files into them."""
    for path in paths:
        absent = 0 if path.exists() else _SETTLED
        for _ in range(_REMOVAL_TRIES):
            if absent >= _SETTLED:
                break
            shutil.rmtree(path, ignore_errors=True)
            absent = 0 if path.exists() else absent + 1
            time.sleep(0.02)


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


def place_file(path: Path, source: bytes | Path) -> None:
    """Puts content, or a copy of a file, into a directory that is being built, in a folder of it if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        write_file(path, source)
    else:
        shutil.copyfile(source, path)


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
    try:
        intact = _canonical(values) == data
    except RecursionError:
        intact = False
    if not intact:
        raise UserError(f"{path}: damaged: it does not match its own SHA-256")
    if values.get("format") != FORMAT or values.get("kind") not in KINDS:
        raise UserError(
            f"{path}: is {values.get('format')!r} of {values.get('kind')!r}; expected {FORMAT!r} of {KINDS}"
        )
    for name, entry in _table(values, "files", path).items():
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
            raise UserError(f"{path}: files: {name!r} must have bytes and sha256")
    _table(values, "tensors", path)
    return values


def _table(values: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    if not isinstance(values.get(key), dict):
        raise UserError(f"{path}: {key} must be a table")
    return values[key]


def check_whole(directory: Path, manifest: dict[str, Any]) -> None:
    """The cheap part of `verify_files`: every listed file has its size, and small ones (the config) their digest."""
    for name, entry in manifest["files"].items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else -1
        if size != entry["bytes"]:
            found = "no file" if size < 0 else f"{size} bytes"
            raise UserError(f"{path}: {found}; {MANIFEST} lists {entry['bytes']} bytes")
        if size <= _SMALL_BYTES and _file_entry(path, lambda nbytes: None) != entry:
            raise UserError(f"{path}: damaged: SHA-256 differs from {MANIFEST}")


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
