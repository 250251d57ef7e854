"""The fused QKV projection: which layout a file has, and a proof after loading that it was read that way.

Published FP8 files were quantised per tensor-parallel chunk and concatenated, [Q0 K0 V0 | Q1 K1 V1 | ...], each chunk
with its own padded scale grid; dequantised exports hold [Q | K | V], or three tensors. Reading one as another passes
every shape check and yields fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Array

from mimo_jax.config.model import ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.weights import BlockFp8Tensor, dequantize_fp8
from mimo_jax.weights.params import Weight, qkv_rows, split_names

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


def probe(config: ModelConfig, weights: list[Weight], params: dict, order: str, read: Callable) -> int:
    """Recomputes one Q, K and V head per given projection from the file's bytes and compares with the tree.

    `read(name)` gives a raw tensor. Returns the number of heads compared; a difference is an error. Of a tree spread
    over processes, a head that this one holds is taken, if there is one.
    """
    compared = 0
    for weight in weights:
        leaf = weight.of(params)
        for letter in LETTERS if weight.path[-1] == "qkv" else weight.path[-1]:
            heads = config.num_heads if letter == "q" else config.kv_heads(weight.layer_kind)
            tried = [(2 * heads // 3 + step) % heads for step in range(heads)]
            rows = ((head, _tree_rows(config, weight, leaf, letter, head)) for head in tried)
            head, held = next(((head, row) for head, row in rows if row is not None), (0, None))
            if held is None:
                continue
            raw = _raw_rows(config, weight, letter, head, order, read)
            if not np.array_equal(raw, held, equal_nan=True):
                raise UserError(f"{weight.label}: head {head} of {letter} differs from the file's bytes; not loaded")
            compared += 1
    return compared


def _head_rows(config: ModelConfig, kind: int, letter: str, head: int, order: str) -> np.ndarray:
    """Rows of one head in the file's tensor, by the published formula."""
    dim = config.v_head_dim if letter == "v" else config.head_dim
    within = np.arange(dim)
    if order == SEPARATE:
        return head * dim + within
    sizes = qkv_rows(config, kind)
    before = sum(sizes[: LETTERS.index(letter)])
    if order == CONTIGUOUS:
        return before + head * dim + within
    chunks = config.qkv_chunks
    heads_per_chunk = sizes[LETTERS.index(letter)] // dim // chunks
    chunk, local = divmod(head, heads_per_chunk)
    return chunk * (sum(sizes) // chunks) + before // chunks + local * dim + within


def _raw_rows(config: ModelConfig, weight: Weight, letter: str, head: int, order: str, read: Callable) -> np.ndarray:
    part = weight.parts[0]
    name = part.tensor_name()
    if weight.path[-1] == "qkv" and order == SEPARATE:
        name = split_names(name)[LETTERS.index(letter)]
    rows = _head_rows(config, weight.layer_kind, letter, head, SEPARATE if weight.path[-1] != "qkv" else order)
    values = read(name)[rows].astype(np.float32)
    if weight.stored != "fp8":
        return values
    chunk_rows = part.shape[-2]
    grid_rows = -(-chunk_rows // _BLOCK)
    block = rows // chunk_rows * grid_rows + rows % chunk_rows // _BLOCK
    scales = read(weight.parts[1].tensor_name())[block]
    return values * scales[:, np.arange(values.shape[1]) // _BLOCK]


def _tree_rows(config: ModelConfig, weight: Weight, leaf, letter: str, head: int) -> np.ndarray | None:
    """A head's rows as numbers; None where this process does not hold them."""
    dim = config.v_head_dim if letter == "v" else config.head_dim
    if weight.path[-1] != "qkv":
        return _numbers(leaf, head * dim, (head + 1) * dim)
    rows = chunk_slices(config, weight.layer_kind)[LETTERS.index(letter)]
    chunk, local = divmod(head, (rows.stop - rows.start) // dim)
    held = _numbers(leaf, chunk, chunk + 1)
    return None if held is None else held[0, rows][local * dim : (local + 1) * dim]


def _numbers(leaf, start: int, stop: int) -> np.ndarray | None:
    if not isinstance(leaf, BlockFp8Tensor):
        held = _held(leaf, start, stop)
        return None if held is None else held.astype(np.float32)
    is_matrix = leaf.codes.ndim == 2  # its rows share blocks of scales: it is needed whole
    codes, scales = (
        _held(part, *((0, len(part)) if is_matrix else (start, stop))) for part in (leaf.codes, leaf.scales)
    )
    if codes is None or scales is None:
        return None
    numbers = np.asarray(dequantize_fp8(BlockFp8Tensor(codes, scales), np.float32))
    return numbers[start:stop] if is_matrix else numbers


def _held(array: Array | np.ndarray, start: int, stop: int) -> np.ndarray | None:
    """Rows of the leading axis, if one of this process's devices has them whole."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)[start:stop]
    for shard in array.addressable_shards:
        first, last, _ = shard.index[0].indices(array.shape[0])
        if first <= start and stop <= last and shard.data.shape[1:] == array.shape[1:]:
            return np.asarray(shard.data)[start - first : stop - first]
    return None
