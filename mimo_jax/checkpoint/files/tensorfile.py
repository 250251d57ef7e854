"""Safetensors files and the index of several: a strict reader written for hostile input, and a streaming writer.

File: 8 bytes little-endian header length, a JSON header, the data. Every size is compared with the file before
anything is allocated, and Python's integers make the products exact. Tensors come out as numpy views of the mapped
file; nothing is copied. Whatever is wrong ends as one `UserError` naming the file, the thing and what was expected.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.errors import UserError
from mimo_jax.weights.dtypes import DTYPES

MAX_HEADER_BYTES = 100_000_000
# Parsed JSON takes some twenty times its text: beyond this, text must be a small part of the data it describes.
FREE_JSON_BYTES = 2_000_000
JSON_SHARE = 16
MAX_TENSORS = 1_000_000
MAX_RANK = 8
MAX_NAME_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One header entry; `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def load_toml(path: Path, most_bytes: int) -> dict[str, Any]:
    """The tables of a TOML file of at most `most_bytes`."""
    try:
        return tomllib.loads(read_bytes(path, most_bytes).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def load_json(data: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object strictly: duplicate keys, NaN, lone surrogates and absurd depth are errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"key {twice!r} appears twice")
        return values

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({_short(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(values).__name__}")
    return values


def _short(value: Any, limit: int = 120) -> str:
    """One line of bounded length, whatever the input held."""
    text = str(value).encode("unicode_escape", "backslashreplace").decode("ascii")
    return text if len(text) <= limit else text[:limit] + "..."


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UserError(f"{path}: {size} bytes; at most {limit} were expected")
        return file.read(limit)


def open_regular(path: Path):
    """Opens a regular file for reading; never blocks on a FIFO or reads a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be opened ({_short(error)})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


class TensorFile:
    """An open safetensors file: `tensors` by name, `read(name)` as a view of the mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(file, path, size)
            self.tensors = _parse_header(header, data_start, size, path)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view; valid as long as this object."""
        info = self.tensors[name]
        flat = np.frombuffer(self._map, np.uint8, count=info.nbytes, offset=info.start)
        return flat.view(DTYPES[info.dtype]).reshape(info.shape)

    def release(self, name: str) -> None:
        """Gives the tensor's pages back: they would count as this process's memory until the file is closed."""
        info = self.tensors[name]
        start = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (info.start + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, length)


def _read_header(file, path: Path, size: int) -> tuple[bytes, int]:
    if size < 8:
        raise UserError(f"{path}: {size} bytes; a safetensors file starts with 8 bytes of header length")
    length = int.from_bytes(file.read(8), "little")
    allowed = min(MAX_HEADER_BYTES, size - 8, max(FREE_JSON_BYTES, size // JSON_SHARE))
    if length > allowed:
        raise UserError(f"{path}: claims a header of {length} bytes; at most {allowed} of its {size} bytes can be one")
    header = file.read(length)
    if not header.startswith(b"{"):
        raise UserError(f"{path}: the header does not start with '{{'; expected a safetensors file")
    return header, 8 + length


def _parse_header(header: bytes, data_start: int, size: int, path: Path) -> dict[str, TensorInfo]:
    values = load_json(header, str(path))
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: __metadata__ must map strings to strings")
    if len(values) > MAX_TENSORS:
        raise UserError(f"{path}: {len(values)} tensors; at most {MAX_TENSORS} are allowed")
    tensors, spans = {}, []
    for name, entry in values.items():
        where = f"{path}: tensor {_short(name)!r}"
        info, end = _parse_entry(name, entry, data_start, where)
        tensors[name] = info
        spans.append((info.start, end, name))
    position = data_start
    for start, end, name in sorted(spans):
        if start != position:
            raise UserError(
                f"{path}: tensor {_short(name)!r} starts at byte {start}, expected {position}: a hole or an overlap"
            )
        position = end
    if position != size:
        raise UserError(f"{path}: tensors end at byte {position} but the file has {size} bytes; truncated or padded")
    return tensors


def _parse_entry(name: str, entry: Any, data_start: int, where: str) -> tuple[TensorInfo, int]:
    if not 0 < len(name) <= MAX_NAME_BYTES or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise UserError(f"{where}: the name must have 1 to {MAX_NAME_BYTES} bytes")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: expected exactly dtype, shape and data_offsets, found {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where}: dtype {_short(dtype)!r} is not supported; known: {', '.join(DTYPES)}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
            raise UserError(f"{where}: {key} {_short(value)} must be a list of integers in 0..2**63-1")
    if len(shape) > MAX_RANK or len(offsets) != 2:
        raise UserError(f"{where}: {len(shape)} axes and {len(offsets)} offsets; at most {MAX_RANK} and exactly 2")
    begin, end = offsets
    if dtype == "F4":
        if not shape or shape[-1] % 2:
            raise UserError(f"{where}: F4 {shape} must have whole bytes along its last axis")
        shape = [*shape[:-1], shape[-1] // 2]
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise UserError(f"{where}: {dtype} {shape} needs {needed} bytes, its offsets span {end - begin}")
    return TensorInfo(dtype, tuple(shape), data_start + begin), data_start + end


def as_bytes(array: np.ndarray) -> memoryview:
    """An array's bytes as they are stored, without a copy where they lie in a row."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class TensorFileWriter:
    """Writes a file whose tensors are known beforehand, in any order and without holding any of them."""

    def __init__(self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        """`tensors`: name -> (dtype, shape). The widest dtypes come first, so that every tensor is aligned."""
        self.path = path
        self._offsets: dict[str, TensorInfo] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name)):
            dtype, shape = tensors[name]
            info = TensorInfo(dtype, tuple(shape), position)
            self._offsets[name] = info
            position += info.nbytes
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [info.start, position]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start, self._pending = 8 + len(text), set(tensors)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._write(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, array: np.ndarray) -> None:
        """Stores one tensor; dtype and shape must be what was announced."""
        info = self._offsets[name]
        if array.shape != info.shape or array.dtype != DTYPES[info.dtype] or name not in self._pending:
            raise ValueError(f"{name}: {array.dtype} {array.shape}, announced {info.dtype} {info.shape}, or twice")
        self._pending.remove(name)
        self._write(as_bytes(array), self._start + info.start)

    def _write(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view[: 1 << 26], position)
            view, position = view[written:], position + written

    def close(self) -> None:
        """Syncs; every announced tensor must have been written."""
        if self._pending:
            raise ValueError(f"{self.path}: {len(self._pending)} tensors never written, {min(self._pending)} first")
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1

    def abort(self) -> None:
        """Closes the file as it is; what to do with it is the caller's business."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_index(path: Path, directory: Path, held: set[str]) -> dict[str, str]:
    """Tensor name -> file of a sharding index, each of which must be among the `held` names of `directory`."""
    data_bytes = sum((directory / name).stat().st_size for name in held if (directory / name).is_file())
    values = load_json(read_bytes(path, max(FREE_JSON_BYTES, data_bytes // JSON_SHARE)), str(path))
    placed = values.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise UserError(f"{path}: weight_map must map tensor names to file names")
    for shard in sorted(set(placed.values())):
        if not shard.endswith(".safetensors") or Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise UserError(f"{path}: {shard[:200]!r} must be a plain .safetensors file name")
        if shard not in held:
            raise UserError(f"{path}: names {shard[:200]!r}, which is not in the directory")
    return placed


def inside(directory: Path, name: str) -> Path:
    """The path of a file of a checkpoint, `name` with slashes; a link may lead to no place but the checkpoint's own.

    In a Hugging Face cache that is also the repository's blobs: `snapshots/<revision>/<name>` -> `../../blobs/<hash>`.
    """
    path, root = directory / name, os.path.realpath(directory)
    real = os.path.realpath(path)
    if not real.startswith(os.path.join(root, "")) and os.path.dirname(real) != _blobs(Path(root)):
        raise UserError(f"{path}: a link out of the directory; copy the files there (hf download --local-dir)")
    return path


def _blobs(root: Path) -> str | None:
    """Where the files of `root` lie if it is (in) a snapshot of a Hugging Face cache."""
    snapshots = next((folder for folder in root.parents if folder.name == "snapshots"), None)
    return str(snapshots.parent / "blobs") if snapshots else None
