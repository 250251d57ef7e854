"""Directories that appear complete or not at all, and the manifest that proves them.

`manifest.json` is written last. It lists every file with its size and SHA-256, every tensor with its own, and holds the
digest of its own other lines, so that no flipped bit goes unseen. It comes from others, like all of a checkpoint: its
names are plain paths inside the directory, and its size is in proportion to what lies there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimo_jax.checkpoint.files.tensorfile import (
    FREE_JSON_BYTES,
    JSON_SHARE,
    MAX_HEADER_BYTES,
    MAX_NAME_BYTES,
    inside,
    load_json,
    open_regular,
    read_bytes,
)
from mimo_jax.cli.progress import progress
from mimo_jax.errors import UserError
from mimo_jax.files import exclusive, sync_directory

MANIFEST = "manifest.json"
FORMAT = "mimo_jax checkpoint 1"
KINDS = ("huggingface", "orbax", "step")
_CHUNK = 1 << 20
_SMALL_BYTES = 1 << 16
_MAX_PART_BYTES = 255  # of a name, between slashes
_REMOVAL_TRIES, _SETTLED = 200, 5  # tries of 20 ms; so many in a row must find nothing
_OWN_DIGEST = re.compile(rb'\n "sha256": "([0-9a-f]{64})",(?=\n)')  # the line that the digest leaves out
_SHA256 = re.compile("[0-9a-f]{64}")


@contextmanager
def new_directory(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty neighbour of `destination` that takes its place when the block ends well.

    One process at a time writes a destination; a second one is refused at once. A block that fails leaves nothing; one
    that is killed leaves hidden neighbours, which the next attempt removes. A directory being replaced stays where it
    is until the new one is complete.
    """
    destination = Path(os.path.abspath(destination))
    partial, replaced = partial_of(destination), _beside(destination, "replaced")
    busy = f"{destination}: another process is writing it; wait until it is done, or choose another place"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(_beside(destination, "lock"), busy):
            try:
                if (replaced / MANIFEST).exists() and not destination.exists():
                    replaced.rename(destination)  # killed between the two renames below
                refuse_existing(destination, overwrite)
                _discard(replaced)
                remove_all((partial,))
                partial.mkdir()
                yield partial
                _sync_tree(partial)
                refuse_existing(destination, overwrite)  # it may have come, or changed, in the meantime
                if destination.exists():
                    destination.rename(replaced)
                partial.rename(destination)
                sync_directory(destination.parent)
                _discard(replaced)
            finally:
                remove_all((partial,))
    except UserError as error:
        raise UserError(str(error).replace(str(partial), str(destination))) from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
        elsewhere = error.filename and not str(error.filename).startswith((str(destination), str(partial)))
        where = f": {error.filename}" if elsewhere else ""
        raise UserError(f"{destination}: could not be written ({reason}{where})") from None


def _beside(destination: Path, what: str) -> Path:
    return destination.with_name(f".{destination.name}.{what}")


def partial_of(destination: Path) -> Path:
    """Where `new_directory` builds `destination`."""
    return _beside(destination, "partial")


def _discard(replaced: Path) -> None:
    """Its manifest goes first: without one it does not come back, should the rest of the removal be killed."""
    (replaced / MANIFEST).unlink(missing_ok=True)
    remove_all((replaced,))


def remove_leftovers(directory: Path) -> None:
    """What killed writers of directories in `directory` left there; the lock of a living one keeps what it builds."""
    for lock in directory.glob(".*.lock"):
        destination = directory / lock.name.removeprefix(".").removesuffix(".lock")
        with contextlib.suppress(UserError), exclusive(lock, f"{destination}: is being written"):
            remove_all((partial_of(destination),))


def refuse_existing(destination: Path, overwrite: bool) -> None:
    """Only what these converters wrote may be replaced, all of which a manifest lists, and only when asked to."""
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise UserError(f"{destination}: already exists; give --overwrite to replace it")
    if destination.is_symlink() or not (destination / MANIFEST).is_file():
        raise UserError(f"{destination}: has no {MANIFEST}, so it is not a written checkpoint; not replaced")
    try:
        listed = read_manifest(destination)["files"]
        unlisted = [name for name in list_files(destination) if name not in listed]
    except UserError as error:
        raise UserError(f"{destination}: not replaced, as it is not a checkpoint written here ({error})") from None
    if unlisted:
        raise UserError(f"{destination}: not replaced, as its {MANIFEST} does not list {unlisted[0]}; move that away")


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
        with open_regular(source) as original, path.open("xb") as copy:
            shutil.copyfileobj(original, copy, _CHUNK)


def write_manifest(
    directory: Path,
    kind: str,
    tensors: Mapping[str, str],
    advance: Callable[[int], None],
    copied: Mapping[str, Any] | None = None,
) -> None:
    """Describes every file of `directory`; `tensors` maps a tensor's name to its SHA-256.

    Files that were `copied` must be what the manifest they come from says of them: `copied` holds its entries.
    """
    files = {name: _file_entry(directory / name, advance) for name in list_files(directory)}
    for name, entry in (copied or {}).items():
        if files[name] != entry:
            raise UserError(f"{directory / name}: damaged: size or SHA-256 differs from {MANIFEST}")
    write_file(directory / MANIFEST, _canonical({"format": FORMAT, "kind": kind, "files": files, "tensors": tensors}))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, after checking it against its own digest. A directory without one is not complete."""
    path = inside(directory, MANIFEST)
    if not path.exists():
        raise UserError(f"{path}: not found; an incomplete conversion, or not written by convert.py")
    data = read_bytes(path, _max_bytes(directory, path))
    _check_digest(data, path)
    values = load_json(data, str(path))
    if values.get("format") != FORMAT or values.get("kind") not in KINDS:
        found = f"{values.get('format')!r:.60} of {values.get('kind')!r:.60}"
        raise UserError(f"{path}: is {found}; expected {FORMAT!r} of {KINDS}")
    for name, entry in _table(values, "files", path).items():
        if not _is_plain(name):
            raise UserError(f"{path}: files: {name[:200]!r} is not a plain path inside the directory")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"} or not _is_entry(**entry):
            raise UserError(f"{path}: files: {name[:200]!r} must have bytes and sha256")
    for name, digest in _table(values, "tensors", path).items():
        if not _is_digest(digest):
            raise UserError(f"{path}: tensors: {name[:200]!r} must have a SHA-256")
    return values


def _max_bytes(directory: Path, path: Path) -> int:
    """Parsed, it takes some twenty times its size: a large manifest must be a small part of what it describes."""
    if path.stat().st_size <= FREE_JSON_BYTES:
        return FREE_JSON_BYTES
    held = sum((directory / name).stat().st_size for name in list_files(directory))
    return min(MAX_HEADER_BYTES, max(FREE_JSON_BYTES, held // JSON_SHARE))


def _check_digest(data: bytes, path: Path) -> None:
    """Before anything is parsed: the digest of the text without the line that holds it."""
    line = _OWN_DIGEST.search(data)
    digest = hashlib.sha256()
    if line:
        digest.update(memoryview(data)[: line.start()])
        digest.update(memoryview(data)[line.end() :])
    if not line or digest.hexdigest() != line[1].decode():
        raise UserError(f"{path}: damaged, or not written by convert.py: it does not match its own SHA-256")


def _table(values: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    if not isinstance(values.get(key), dict):
        raise UserError(f"{path}: {key} must be a table")
    return values[key]


def _is_plain(name: str) -> bool:
    """Whether a name is a relative path that stays inside, spelt in one way, on one line."""
    parts = name.split("/")
    return (
        name != MANIFEST
        and name.isprintable()
        and "\\" not in name
        and len(name) <= MAX_NAME_BYTES
        and all(part not in ("", ".", "..") and len(part.encode()) <= _MAX_PART_BYTES for part in parts)
    )


def _is_entry(bytes: Any, sha256: Any) -> bool:
    return type(bytes) is int and bytes >= 0 and _is_digest(sha256)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def check_whole(directory: Path, manifest: dict[str, Any]) -> None:
    """The cheap part of `verify_files`: every listed file has its size, and small ones (the config) their digest."""
    for name, entry in manifest["files"].items():
        path = inside(directory, name)
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


def verify_directory(directory: Path) -> dict[str, Any]:
    """Reads all files of a directory, compares them with its manifest and returns that."""
    if not directory.is_dir():
        raise UserError(f"{directory}: not found; expected a checkpoint directory")
    manifest = read_manifest(directory)
    with progress("verifying", sum(entry["bytes"] for entry in manifest["files"].values()), "bytes") as bar:
        verify_files(directory, manifest, bar.advance)
    return manifest


def list_files(directory: Path) -> list[str]:
    """Relative names of all files but the manifest. FIFOs, devices and links that lead out are errors."""
    names = []
    for folder, folders, files in os.walk(directory):
        for name in [*folders, *files]:
            path = Path(folder) / name
            relative = path.relative_to(directory).as_posix()
            if relative != MANIFEST and not _is_plain(relative):
                raise UserError(f"{str(path)!r}: not a name that a checkpoint may have")
            if not (inside(directory, relative).is_file() or (path.is_dir() and not path.is_symlink())):
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
    """Keys on lines of their own, in order, so that the line of the digest can be found and left out."""
    body = json.dumps(values, indent=1, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**values, "sha256": digest}, indent=1, sort_keys=True).encode()
