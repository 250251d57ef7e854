"""The fused QKV projection: which layout a file has, and a proof after loading that it was read that way.

Published FP8 files were quantised per tensor-parallel chunk and concatenated, [Q0 K0 V0 | Q1 K1 V1 | ...], each chunk
with its own padded scale grid; dequantised exports hold [Q | K | V], or three tensors. Reading one as another passes
every shape check and yields fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from mimo_jax.checkpoint.names import Weight, qkv_rows, split_names
from mimo_jax.config import ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.quantization import BlockFp8Tensor, dequantize_fp8

INTERLEAVED, CONTIGUOUS, SEPARATE = "interleaved", "contiguous", "separate"
_BLOCK = 128
_MAX_CHUNKS = 4096
LETTERS = "qkv"


def infer_chunks(config: ModelConfig, observed: Iterable[tuple[str, int, int, int]]) -> int:
    """The chunk count that explains every (name, layer kind, weight rows, scale rows); must be the config's.

    A layer alone may allow several (14848 rows on a grid of 116 allow 1, 2 and 4): the layers decide together, and
    what is still open goes to the largest, as published readers have it.
    """
    candidates: set[int] | None = None
    for name, kind, rows, grid_rows in sorted(set(observed)):
        limit = min(config.kv_heads(kind), rows, grid_rows, _MAX_CHUNKS)
        allowed = {
            chunks
            for chunks in range(1, limit + 1)
            if config.num_heads % chunks == config.kv_heads(kind) % chunks == rows % chunks == 0
            and chunks * -(-rows // chunks // _BLOCK) == grid_rows
        }
        candidates = allowed if candidates is None else candidates & allowed
        if not candidates:
            needed = config.qkv_chunks * -(-rows // config.qkv_chunks // _BLOCK)
            raise UserError(
                f"{name}: {rows} weight rows with {grid_rows} scale rows; the config's {config.qkv_chunks} chunks "
                f"need {needed} scale rows, and no other chunk count fits every layer"
            )
    found = max(candidates) if candidates else config.qkv_chunks
    if found != config.qkv_chunks:
        raise UserError(
            f"qkv_proj: weight and scale shapes say {found} chunks, the config says {config.qkv_chunks} "
            "(num_key_value_heads)"
        )
    return found


def chunk_slices(config: ModelConfig, kind: int) -> tuple[slice, slice, slice]:
    """Rows of Q, K and V within a chunk."""
    query, key, value = (rows // config.qkv_chunks for rows in qkv_rows(config, kind))
    return slice(0, query), slice(query, query + key), slice(query + key, query + key + value)


def interleave(thirds: Iterable[np.ndarray], config: ModelConfig, kind: int, out_GMD: np.ndarray) -> None:
    """Writes Q, K and V, each [rows, D] in head order, into the chunked layout of the tree."""
    for third, rows in zip(thirds, chunk_slices(config, kind)):
        out_GMD[:, rows] = third.reshape(config.qkv_chunks, -1, third.shape[-1])


def probe(config: ModelConfig, weights: list[Weight], params: dict, layout: str, read: Callable) -> int:
    """Recomputes one Q, K and V head per given projection from the file's bytes and compares with the tree.

    `read(name)` gives a raw tensor. Returns the number of heads compared; a difference is an error.
    """
    compared = 0
    for weight in weights:
        leaf = params
        for key in weight.path:
            leaf = leaf[key]
        for letter in LETTERS if weight.path[-1] == "qkv" else weight.path[-1]:
            heads = config.num_heads if letter == "q" else config.kv_heads(weight.kind)
            head = 2 * heads // 3
            raw = _raw_rows(config, weight, letter, head, layout, read)
            held = _tree_rows(config, weight, leaf, letter, head)
            if not np.array_equal(raw, held, equal_nan=True):
                raise UserError(f"{weight.label}: head {head} of {letter} differs from the file's bytes; not loaded")
            compared += 1
    return compared


def _head_rows(config: ModelConfig, kind: int, letter: str, head: int, layout: str) -> np.ndarray:
    """Rows of one head in the file's tensor, by the published formula."""
    dim = config.v_head_dim if letter == "v" else config.head_dim
    within = np.arange(dim)
    if layout == SEPARATE:
        return head * dim + within
    sizes = qkv_rows(config, kind)
    before = sum(sizes[: LETTERS.index(letter)])
    if layout == CONTIGUOUS:
        return before + head * dim + within
    chunks = config.qkv_chunks
    heads_per_chunk = sizes[LETTERS.index(letter)] // dim // chunks
    chunk, local = divmod(head, heads_per_chunk)
    return chunk * (sum(sizes) // chunks) + before // chunks + local * dim + within


def _raw_rows(config: ModelConfig, weight: Weight, letter: str, head: int, layout: str, read: Callable) -> np.ndarray:
    part = weight.parts[0]
    name = part.tensor_name()
    if weight.path[-1] == "qkv" and layout == SEPARATE:
        name = split_names(name)[LETTERS.index(letter)]
    rows = _head_rows(config, weight.kind, letter, head, SEPARATE if weight.path[-1] != "qkv" else layout)
    values = read(name)[rows].astype(np.float32)
    if weight.format != "fp8":
        return values
    chunk_rows = part.shape[-2]
    grid_rows = -(-chunk_rows // _BLOCK)
    block = rows // chunk_rows * grid_rows + rows % chunk_rows // _BLOCK
    scales = read(weight.parts[1].tensor_name())[block]
    return values * scales[:, np.arange(values.shape[1]) // _BLOCK]


def _tree_rows(config: ModelConfig, weight: Weight, leaf, letter: str, head: int) -> np.ndarray:
    dim = config.v_head_dim if letter == "v" else config.head_dim
    if weight.path[-1] != "qkv":
        return _numbers(leaf)[head * dim : (head + 1) * dim]
    rows = chunk_slices(config, weight.kind)[LETTERS.index(letter)]
    chunk, local = divmod(head, (rows.stop - rows.start) // dim)
    return _numbers(leaf, chunk)[rows][local * dim : (local + 1) * dim]


def _numbers(leaf, index=()) -> np.ndarray:
    if isinstance(leaf, BlockFp8Tensor):
        held = BlockFp8Tensor(np.asarray(leaf.codes)[index], np.asarray(leaf.scales)[index])
        return np.asarray(dequantize_fp8(held, np.float32))
    return np.asarray(leaf)[index].astype(np.float32)
