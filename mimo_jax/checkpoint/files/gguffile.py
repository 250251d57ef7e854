"""GGUF, the file format of llama.cpp: what its numbers mean, and a strict reader written for hostile input.

File: magic and version, how many tensors and values, the named values, the named tensors (axes, type, place), and from
the next aligned byte on their data. Every count and place is compared with the bytes there are before it is used.
Whatever is wrong ends as one `UserError` that names the file and the field.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.checkpoint.files.tensorfile import open_regular
from mimo_jax.checkpoint.finite import check_finite
from mimo_jax.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # they differ in what byte order a file may have; the other one looks like another version
ALIGNMENT = 32  # bytes, of every tensor, unless the file says otherwise
BLOCK = 32  # weights that share a scale
F32, F16, Q4_0, Q4_1, Q8_0, BF16, MXFP4 = 0, 1, 2, 3, 8, 30, 39  # of a tensor, as ggml.h numbers them
UINT32, INT32, FLOAT32, BOOL, STRING, LIST = 4, 5, 6, 7, 8, 9  # of a value, as the format numbers them
_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", UINT32: "<u4", INT32: "<i4", FLOAT32: "<f4", BOOL: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # kinds of tokens
_MAX_HEADER_BYTES = 1 << 25  # a vocabulary of 256,000 takes 10 MB; as Python's strings, six times its bytes at most
_MAX_ITEMS = 1 << 16  # values, and tensors
_MAX_NAME_BYTES = 1 << 8
_MAX_AXES = 4
_MAX_ALIGNMENT = 1 << 16
_LEAST_VALUE, _LEAST_TENSOR = 13, 32  # bytes that one takes in the header


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a type of tensor keeps weights: so many bytes for a block, and what makes float32 of blocks of bytes."""

    name: str
    block: int
    bytes: int
    expand: Callable[[np.ndarray], np.ndarray]


def _plain(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: blocks.view(dtype).astype(np.float32)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 of each block that begins at a byte, as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """0 to 15: the low halves of all bytes of a block, then the high ones."""
    return np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32)


# The types that are read; the rest of ggml's are named by their number.
STORAGES = {
    F32: Storage("F32", 1, 4, _plain("<f4")),
    F16: Storage("F16", 1, 2, _plain("<f2")),
    BF16: Storage("BF16", 1, 2, _plain(ml_dtypes.bfloat16)),
    Q4_0: Storage("Q4_0", BLOCK, 18, lambda blocks: _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)),
    Q4_1: Storage("Q4_1", BLOCK, 20, lambda blocks: _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)),
    Q8_0: Storage("Q8_0", BLOCK, 34, lambda blocks: _half(blocks, 0) * blocks[:, 2:].view(np.int8)),
}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Weights [..., O, I], I the contiguous axis; `start` counts from the beginning of the file."""

    storage: Storage
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.storage.block * self.storage.bytes


class GgufFile:
    """An open file: `values` by name (numbers, texts, lists of texts, arrays of numbers), `tensors` by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{path}: does not begin with {MAGIC.decode()}; expected a GGUF file")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = _Header(self._map, path)
        self.values, self.tensors = header.read(size)

    def one_of(self, name: str, known: Iterable[str]) -> str:
        """A text that must be one of those."""
        found = self.values.get(name)
        if not isinstance(found, str) or found not in known:
            raise UserError(f"{self.path}: {name}={reprlib.repr(found)} must be one of {', '.join(known)}")
        return found

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32."""
        tensor = self.tensors[name]
        blocks = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.start).reshape(-1, tensor.storage.bytes)
        with np.errstate(invalid="ignore", over="ignore"):  # the check below says what numpy would warn of
            weights = tensor.storage.expand(blocks).reshape(tensor.shape)
        check_finite(weights, f"{self.path}: tensor {name!r}")
        return weights


class _Header:
    """Reads one thing after the other from the beginning of a file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path = data, path
        self._at, self._end = len(MAGIC), min(len(data), _MAX_HEADER_BYTES)

    def read(self, size: int) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Values and tensors, whose data must lie within the `size` bytes of the file, none in another's."""
        if (version := self._whole(4, "version")) not in VERSIONS:
            raise self._wrong(f"version {version}; expected {' or '.join(map(str, VERSIONS))}, little-endian")
        tensor_count, value_count = self._whole(8, "tensor count"), self._whole(8, "value count")
        self._check_count(value_count, _LEAST_VALUE, "value count", _MAX_ITEMS)
        values: dict[str, Any] = {}
        for _ in range(value_count):
            name = self._new_name("a value", values)
            values[name] = self._value(name)
        alignment = values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            limits = f"a power of two up to {_MAX_ALIGNMENT}"
            raise self._wrong(f"general.alignment={reprlib.repr(alignment)} must be {limits}")
        self._check_count(tensor_count, _LEAST_TENSOR, "tensor count", _MAX_ITEMS)
        tensors: dict[str, GgufTensor] = {}
        for _ in range(tensor_count):
            name = self._new_name("a tensor", tensors)
            tensors[name] = self._tensor(f"tensor {name!r}", alignment)
        start = -(-self._at // alignment) * alignment
        tensors = {name: dataclasses.replace(one, start=start + one.start) for name, one in tensors.items()}
        self._check_places(tensors, start, size)
        return values, tensors

    def _check_places(self, tensors: dict[str, GgufTensor], start: int, size: int) -> None:
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            end = tensor.start + tensor.nbytes
            if tensor.start < start or end > size:
                where = f"bytes {tensor.start} to {end}, where bytes {start} to {size} are free: cut short, or damaged"
                raise self._wrong(f"tensor {name!r}: lies at {where}")
            start = end

    def _tensor(self, where: str, alignment: int) -> GgufTensor:
        """One whose place still counts from the beginning of the data."""
        axes = self._whole(4, f"{where}: number of axes")
        if not 1 <= axes <= _MAX_AXES:
            raise self._wrong(f"{where}: {axes} axes; expected 1 to {_MAX_AXES}")
        shape = tuple(self._whole(8, f"{where}: shape") for _ in range(axes))[::-1]
        kind, place = self._whole(4, f"{where}: type"), self._whole(8, f"{where}: offset")
        if kind not in STORAGES:
            known = ", ".join(storage.name for storage in STORAGES.values())
            raise self._wrong(f"{where}: has ggml's type {kind}; known: {known}")
        storage = STORAGES[kind]
        if not all(shape) or shape[-1] % storage.block:
            rule = f"positive, and the last a multiple of {storage.block}" if storage.block > 1 else "positive"
            raise self._wrong(f"{where}: {storage.name} of shape {list(shape)}; sizes must be {rule}")
        if place % alignment:
            raise self._wrong(f"{where}: offset {place} is no multiple of general.alignment={alignment}")
        return GgufTensor(storage, shape, place)

    def _value(self, where: str) -> Any:
        kind = self._whole(4, f"{where}: type")
        if kind == STRING:
            return self._text(where)
        if kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind], 1, where)[0].item()
        if kind != LIST:
            raise self._wrong(f"{where}: has type {kind}, which GGUF does not know")
        kind, count = self._whole(4, f"{where}: type of its items"), self._whole(8, f"{where}: length")
        if kind == STRING:
            self._check_count(count, 8, f"{where}: length")
            return [self._text(where) for _ in range(count)]
        if kind not in _NUMBERS:
            raise self._wrong(f"{where}: is a list of items of type {kind}; expected numbers or texts")
        return self._numbers(_NUMBERS[kind], count, where).copy()

    def _new_name(self, what: str, taken: dict[str, Any]) -> str:
        name = self._text(f"name of {what}", _MAX_NAME_BYTES)
        if not name or not name.isprintable() or name in taken:
            why = "twice" if name in taken else "empty or not printable"
            raise self._wrong(f"name of {what}: {reprlib.repr(name)} is {why}")
        return name

    def _text(self, where: str, most: int = _MAX_HEADER_BYTES) -> str:
        length = self._whole(8, f"{where}: length")
        self._check_count(length, 1, where, most)
        try:
            return self._take(length, where).decode()
        except UnicodeDecodeError as error:
            raise self._wrong(f"{where}: byte {error.start} of its text is not UTF-8") from None

    def _whole(self, size: int, where: str) -> int:
        return int.from_bytes(self._take(size, where), "little")

    def _numbers(self, dtype: str, count: int, where: str) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        self._check_count(count, size, where)
        return np.frombuffer(self._take(count * size, where), dtype)

    def _check_count(self, count: int, least: int, where: str, most: int = _MAX_HEADER_BYTES) -> None:
        """Before anything is read: so many items of at least so many bytes must be there, and at most so many."""
        left = self._end - self._at
        if count > most:
            raise self._wrong(f"{where}: claims {count}; at most {most} are read")
        if count * least > left:
            limit = ", the most that a header may have" if self._end == _MAX_HEADER_BYTES else ""
            raise self._wrong(f"{where}: claims {count}, but {left} bytes are left{limit}: cut short, or damaged")

    def _take(self, count: int, where: str) -> bytes:
        self._check_count(count, 1, where)
        self._at += count
        return self._data[self._at - count : self._at]

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self._path}: {what}")
