"""Files of `torch.save`: a dict of numbers and tensors, read and written without torch.

Such a file is a zip of raw storages and one pickle. The pickle is never given to `pickle`: even an unpickler that
imports nothing can be made to hang or to fill the memory by a few dozen bytes. It runs on a small stack machine whose
values are inert, whose only functions are those below, and whose dict keys are strings.
"""

from __future__ import annotations

import dataclasses
import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.checkpoint.files.tensorfile import MAX_RANK, read_bytes
from mimo_jax.errors import UserError
from mimo_jax.weights.dtypes import DTYPES

MAX_PICKLE_BYTES = 1 << 16
_STORAGES = {"BF16": "BFloat16Storage", "F16": "HalfStorage", "F32": "FloatStorage"}
_MAX_ERROR = 200


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    size: int


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor of the file, not read yet: a strided view, counted in elements, of one of its storages."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""
        return self.storage.dtype


class TorchFile:
    """A file of `torch.save`: `values` by name; `read` fetches a `TorchTensor` among them."""

    def __init__(self, path: Path, limit: int) -> None:
        """Reads a file of at most `limit` bytes. Whatever is wrong is a `UserError`; nothing of it is executed."""
        self.path = path
        data = read_bytes(path, limit)
        if not data.startswith(b"PK\x03\x04"):
            old = "; it has the form of torch before 1.6: save it again with a newer one" if data[:1] == b"\x80" else ""
            raise UserError(f"{path}: not a zip, which torch.save writes{old}")
        self._records = self._guarded("zip", lambda: _records(data))
        self.values: dict[str, Any] = self._guarded("data.pkl", lambda: _parse(self._records("data.pkl")))

    def read(self, tensor: TorchTensor) -> np.ndarray:
        """A copy of the tensor."""
        return self._guarded(f"storage {tensor.storage.key[:40]!r}", lambda: _strided(self._records, tensor))

    def _guarded(self, what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # zipfile answers hostile files with a dozen types of exception
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.path}: {what}: {reason[:_MAX_ERROR]}") from None


def _records(data: bytes) -> Callable[[str], bytes]:
    """Gives records by their name below the folder that holds data.pkl."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise ValueError("an entry appears twice")
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"{len(roots)} records data.pkl; expected one")

    def read(name: str) -> bytes:
        entry = entries.get(roots[0] + name)
        if entry is None:
            raise ValueError(f"no record {name!r}")
        if entry.compress_type != zipfile.ZIP_STORED or not entry.compress_size == entry.file_size < len(data):
            raise ValueError(f"record {name!r} is compressed or larger than the file; torch.save stores records as is")
        return archive.read(entry)

    if roots[0] + "byteorder" in entries and (order := read("byteorder")) != b"little":
        raise ValueError(f"byteorder is {order[:20]!r}; expected b'little'")
    return read


def _strided(records: Callable[[str], bytes], tensor: TorchTensor) -> np.ndarray:
    dtype, storage = DTYPES[tensor.dtype], tensor.storage
    data = records(f"data/{storage.key}")
    if len(data) != storage.size * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes; {storage.size} elements of {storage.dtype} were announced")
    if not all(0 < length <= storage.size for length in tensor.shape):
        raise ValueError(f"a tensor of shape {list(tensor.shape)} in {storage.size} elements")
    last = tensor.offset + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides))
    if last >= storage.size or math.prod(tensor.shape) > storage.size:
        raise ValueError(f"a tensor reaches element {last} of {storage.size}, or overlaps itself")
    flat = np.frombuffer(data, dtype)[tensor.offset :]
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides).copy()


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 2**40 for n in numbers):
        raise ValueError("a tensor's offset, shape or strides are not natural numbers, or it has no storage")
    if not len(shape) == len(strides) <= MAX_RANK:
        raise ValueError(f"a tensor of {len(shape)} axes and {len(strides)} strides; at most {MAX_RANK} are allowed")
    return TorchTensor(storage, offset, tuple(shape), tuple(strides))


# What a pickle may name. The functions make inert values; a storage's type is just its dtype.
_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    **{f"torch.{name}": dtype for dtype, name in _STORAGES.items()},
}


class _Machine:
    """The stack machine of a pickle, as far as a dict of numbers and tensors needs it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := self.take(1)) != b".":
            if code not in _OPCODES:
                raise ValueError(f"pickle opcode {code!r} at byte {self.at - 1} is not one that torch.save writes")
            _OPCODES[code](self)
        return self.pop(1)[0]

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        if len(taken) != count:
            raise ValueError("truncated")
        self.at += count
        return taken

    def number(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def line(self) -> str:
        return self.take(self.data.index(b"\n", self.at) + 1 - self.at)[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("a pickle opcode without its operands")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def pop_marked(self) -> list[Any]:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def resolve(self) -> None:
        name = f"{self.line()}.{self.line()}"
        if name not in _GLOBALS:
            raise ValueError(f"names {name[:80]!r}, which is refused, unexecuted; known: {', '.join(_GLOBALS)}")
        self.push(_GLOBALS[name])

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not callable(function):
            raise ValueError(f"calls a value of type {type(function).__name__}")
        self.push(function(*arguments))

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(flat) % 2 or not all(type(key) is str for key in flat[::2]):
            raise ValueError("expected a dict whose keys are strings")
        target.update(zip(flat[::2], flat[1::2]))

    def storage(self) -> None:
        kind, dtype, key, _, size = self.pop(1)[0]
        if kind != "storage" or not isinstance(dtype, str) or dtype not in _STORAGES or type(key) is not str:
            raise ValueError("a reference to something other than a storage")
        if type(size) is not int or not 0 <= size < 2**40:
            raise ValueError("a storage without a number of elements")
        self.push(_Storage(key, dtype, size))


_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: m.number("<B"),  # the protocol
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(m.take(m.number("<I")).decode()),
    b"}": lambda m: m.push({}),
    b")": lambda m: m.push(()),
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"t": lambda m: m.push(tuple(m.pop_marked())),
    b"\x85": lambda m: m.push(tuple(m.pop(1))),
    b"\x86": lambda m: m.push(tuple(m.pop(2))),
    b"\x87": lambda m: m.push(tuple(m.pop(3))),
    b"s": lambda m: m.set_items(m.pop(2)),
    b"u": lambda m: m.set_items(m.pop_marked()),
    b"q": lambda m: m.memoize(m.number("<B")),
    b"r": lambda m: m.memoize(m.number("<I")),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"c": lambda m: m.resolve(),
    b"R": lambda m: m.call(),
    b"Q": lambda m: m.storage(),
}


def _parse(pickled: bytes) -> dict[str, Any]:
    if len(pickled) > MAX_PICKLE_BYTES:
        raise ValueError(f"{len(pickled)} bytes; at most {MAX_PICKLE_BYTES} were expected")
    values = _Machine(pickled).run()
    if type(values) is not dict:
        raise ValueError(f"holds a value of type {type(values).__name__}; expected a dict")
    return values


def torch_file(values: dict[str, int | np.ndarray]) -> bytes:
    """The content of a file that `torch.load(path, weights_only=True)` reads as `values`, arrays as CPU tensors."""
    arrays = [np.ascontiguousarray(value) for value in values.values() if isinstance(value, np.ndarray)]
    keys = iter(range(len(arrays)))
    items = b"".join(
        _text(name) + (_tensor(value, str(next(keys))) if isinstance(value, np.ndarray) else _whole(value))
        for name, value in values.items()
    )
    records = {
        "data.pkl": b"\x80\x02}(" + items + b"u.",
        "byteorder": b"little",
        **{f"data/{key}": array.tobytes() for key, array in enumerate(arrays)},
        "version": b"3\n",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return buffer.getvalue()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _whole(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _tensor(array: np.ndarray, key: str) -> bytes:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)` of a contiguous array."""
    dtype = next(name for name in _STORAGES if DTYPES[name] == array.dtype)
    storage_type = b"ctorch\n" + _STORAGES[dtype].encode() + b"\n"
    storage = _tuple(_text("storage"), storage_type, _text(key), _text("cpu"), _whole(array.size)) + b"Q"
    shape = _tuple(*map(_whole, array.shape))
    strides = _tuple(*(_whole(math.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)))
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(storage, _whole(0), shape, strides, b"\x89", hooks) + b"R"
