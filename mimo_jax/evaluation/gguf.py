"""Writes GGUF, the file format of llama.cpp: named values, and named tensors in the types that it multiplies."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.checkpoint.files.gguffile import (
    ALIGNMENT,
    BF16,
    BLOCK,
    BOOL,
    F32,
    FLOAT32,
    INT32,
    LIST,
    MAGIC,
    MXFP4,
    Q8_0,
    STRING,
    UINT32,
)
from mimo_jax.errors import UserError
from mimo_jax.files import write_atomically
from mimo_jax.weights import MxTensor
from pallas_kernels import mxfp4


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Weights [..., O, I], I the contraction axis: the shape of the numbers, and the bytes of a row after the other."""

    kind: int  # F32, Q8_0, BF16 or MXFP4
    shape: tuple[int, ...]
    data: bytes


def f32(weights: np.ndarray) -> Tensor:
    return Tensor(F32, weights.shape, weights.astype(np.float32).tobytes())


def bf16(weights: np.ndarray) -> Tensor:
    return Tensor(BF16, weights.shape, weights.astype(ml_dtypes.bfloat16).tobytes())


def q8_0(weights: np.ndarray) -> Tensor:
    """Rounded as llama.cpp rounds: blocks of 32 with a scale in float16, maximum / 127, and 32 integers."""
    if weights.shape[-1] % BLOCK:
        raise UserError(f"Q8_0: rows of {weights.shape[-1]} weights; they must be a multiple of {BLOCK}")
    blocks = weights.astype(np.float32).reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    data = np.hstack([scales.astype(np.float16).view(np.uint8), codes.view(np.uint8)])
    return Tensor(Q8_0, weights.shape, data.tobytes())


def mx(weights: MxTensor) -> Tensor:
    """The same codes and scales: a block is its scale and 16 bytes, element i in the low half of byte i, i + 16 in the
    high one.
    """
    codes = mxfp4.unpack(np.asarray(weights.codes)).reshape(-1, BLOCK)
    packed = codes[:, :16] | (codes[:, 16:] << 4)
    return Tensor(MXFP4, weights.shape, np.hstack([np.asarray(weights.scales).reshape(-1, 1), packed]).tobytes())


def write(path: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes a file; `values` are truth values, integers, floats, texts, or lists of one of these."""
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(values))]
    for name, value in values.items():
        head += [_text(name), _value(value)]
    body: list[bytes] = []
    start = 0
    for name, tensor in tensors.items():
        dims = tensor.shape[::-1]  # the contiguous axis first
        head += [_text(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.kind, start)]
        body += [tensor.data, bytes(-len(tensor.data) % ALIGNMENT)]
        start += len(tensor.data) + len(body[-1])
    size = sum(map(len, head))
    write_atomically(path, b"".join([*head, bytes(-size % ALIGNMENT), *body]))


_SCALARS = {bool: (BOOL, "<?"), int: (UINT32, "<I"), float: (FLOAT32, "<f"), str: (STRING, "")}
_IN_LISTS = _SCALARS | {int: (INT32, "<i")}  # llama.cpp wants these


def _value(value: Any) -> bytes:
    """A value after the number of its type; a list says the type of its items once."""
    if not isinstance(value, list):
        kind, code = _SCALARS[type(value)]
        return struct.pack("<I", kind) + _bare(value, code)
    kind, code = _IN_LISTS[type(value[0])]
    return struct.pack("<IIQ", LIST, kind, len(value)) + b"".join(_bare(item, code) for item in value)


def _bare(value: Any, code: str) -> bytes:
    return struct.pack(code, value) if code else _text(value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
