"""Reads Hugging Face directories of the MiMo-V2 family: FP8, FP4-DFlash and dequantised layouts, whole or sharded.

Tensors go one at a time from the mapped file into the leaf they belong to; packed bytes are carried as they are. Every
tensor of the directory is used exactly once and every leaf is filled, or nothing is returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.checkpoint import qkv
from mimo_jax.checkpoint.export import INDEX, MTP_FILE
from mimo_jax.checkpoint.files.tensorfile import TensorFile, inside, load_json, read_bytes, read_index
from mimo_jax.checkpoint.finite import check_stored
from mimo_jax.config.huggingface import from_hf
from mimo_jax.config.model import FileFormat, ModelConfig
from mimo_jax.errors import UserError, one_line
from mimo_jax.weights import Params
from mimo_jax.weights.dtypes import DTYPES, HF_DTYPES
from mimo_jax.weights.params import (
    Part,
    ShardingOf,
    Weight,
    array_path,
    build_tree,
    qkv_rows,
    split_names,
    tensors_of,
    weights,
)
from mimo_jax.weights.towers import TOWERS

SINGLE = "model.safetensors"
# (expected dtype, end of the name) -> other dtypes in which writers keep the same bytes, or a narrower number.
_SAME_BYTES = {
    ("U8", "weight"): ("I8", "F4"),
    ("U8", "weight_scale"): ("F8_E8M0",),
    **dict.fromkeys((("F32", name) for name in ("weight", "weight_scale_inv", "e_score_correction_bias")), ("BF16",)),
}
_MAX_CONFIG_BYTES = 4_000_000
_NAMED = 3  # how many tensors an error names

Region = tuple[slice, ...]  # of an array of the tree


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What any checkpoint holds: the model, how its files store weights, and the weights as they do."""

    config: ModelConfig
    file_format: FileFormat
    params: Params


@dataclasses.dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """An opened directory whose tensors have been matched against the name table, one to one."""

    directory: Path
    config: ModelConfig
    file_format: FileFormat
    files: dict[str, TensorFile]  # tensor name -> its file
    skipped: int  # tensors of towers that its config does not have
    qkv_order: str  # of `qkv`: interleaved, contiguous or separate
    qkv_chunks: int

    def weights(self) -> Iterator[Weight]:
        """What the table says of it."""
        return weights(self.config, self.file_format)

    @property
    def nbytes(self) -> int:
        return sum(file.tensors[name].nbytes for name, file in self.files.items())

    def read(self, name: str) -> np.ndarray:
        return self.files[name].read(name)

    def describe(self) -> str:
        fused = {"interleaved": f"fused, interleaved in {self.qkv_chunks} chunks", "contiguous": "fused, contiguous"}
        return (
            f"{len(self.files)} tensors ({self.file_format.name}); QKV "
            f"{fused.get(self.qkv_order, 'in three tensors')}; {self.skipped} tensors of towers left out"
        )


def read_hf_config(directory: Path) -> tuple[ModelConfig, FileFormat]:
    """`config.json` of a checkpoint directory, read as strictly as its tensors."""
    path = inside(directory, "config.json")
    values = load_json(read_bytes(path, _MAX_CONFIG_BYTES), str(path))
    try:
        return from_hf(values, str(path))
    except UserError:
        raise
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: a value has the wrong type ({type(error).__name__}: {one_line(error)})") from None


def read_torch_dtype(directory: Path) -> str | None:
    """What the config says of the dense weights' dtype."""
    path = inside(directory, "config.json")
    return load_json(read_bytes(path, _MAX_CONFIG_BYTES), str(path)).get("torch_dtype")


def open_checkpoint(directory: Path) -> HuggingFaceCheckpoint:
    """Opens and matches a directory without reading any tensor."""
    if not directory.is_dir():
        raise UserError(f"{directory}: not found; expected a checkpoint directory")
    config, file_format = read_hf_config(directory)
    files = _open_files(directory)
    absent = tuple(prefix for tower in TOWERS if getattr(config, tower) is None for prefix in TOWERS[tower])
    skipped = [name for name in files if name.startswith(absent)]
    for name in skipped:
        del files[name]
    file_format = dataclasses.replace(file_format, dtype=_plain_dtype(files))
    order = _qkv_order(config, file_format, files)
    chunks = _check_chunks(config, file_format, order, files)
    opened = HuggingFaceCheckpoint(directory, config, file_format, files, len(skipped), order, chunks)
    _check_names(opened)
    return opened


def _open_files(directory: Path) -> dict[str, TensorFile]:
    """Tensor name -> file, over all shards; a tensor found twice, or not where the index says, is an error."""
    index = inside(directory, INDEX)
    held = {path.name for path in directory.iterdir() if path.suffix == ".safetensors"}
    placed = read_index(index, directory, held) if index.exists() else None
    if placed is not None:
        shards = sorted(set(placed.values()))
    elif SINGLE in held or len(held) == 1:
        shards = [SINGLE if SINGLE in held else held.copy().pop()]
    else:
        raise UserError(f"{directory}: expected {SINGLE} or {INDEX}, found {len(held)} safetensors files")
    if MTP_FILE in held and MTP_FILE not in shards:
        shards.append(MTP_FILE)
    if unnamed := sorted(held - set(shards)):
        raise UserError(f"{directory / unnamed[0]}: not named by {INDEX if placed is not None else SINGLE}")
    files: dict[str, TensorFile] = {}
    for shard in shards:
        opened = TensorFile(inside(directory, shard))
        for name in opened.tensors:
            if name in files:
                raise UserError(f"{directory / shard}: tensor {name!r} is also in {files[name].path.name}")
            if placed is not None and placed.get(name, MTP_FILE) != shard:
                where = f"puts it in {placed[name]}" if name in placed else "does not name it"
                raise UserError(f"{directory / shard}: holds tensor {name!r}, but {INDEX} {where}")
            files[name] = opened
    for name in placed or ():
        if name not in files:
            raise UserError(f"{index}: tensor {name[:200]!r} is not in {placed and placed[name]}")
    return files


def _plain_dtype(files: dict[str, TensorFile]) -> str:
    """The dtype of plain weights, which only the tensors show."""
    name = "model.embed_tokens.weight"
    dtype = files[name].tensors[name].dtype if name in files else "BF16"
    named = {spelling: ours for ours, spelling in HF_DTYPES.items()}
    if dtype not in named:
        raise UserError(f"{files[name].path}: tensor {name!r} is {dtype}; expected BF16 or F32")
    return named[dtype]


def _qkv_order(config: ModelConfig, file_format: FileFormat, files: dict[str, TensorFile]) -> str:
    """How the rows of Q, K and V lie in the files."""
    if not config.fused_qkv:
        return qkv.SEPARATE
    if file_format.of("linear") != "dense":
        return qkv.INTERLEAVED
    fused = next(weight for weight in weights(config, file_format) if weight.path[-1] == "qkv").parts[0].name
    return qkv.SEPARATE if split_names(fused)[0] in files else qkv.CONTIGUOUS


def _check_chunks(config: ModelConfig, file_format: FileFormat, order: str, files: dict[str, TensorFile]) -> int:
    """The chunk count of an interleaved checkpoint, from shapes alone; 1 for other orders."""
    if order != qkv.INTERLEAVED:
        return 1

    def shapes() -> Iterator[tuple[str, int, int, int]]:
        for weight in weights(config, file_format):
            names = [part.tensor_name() for part in weight.parts]
            if weight.path[-1] != "qkv":
                continue
            if any(name not in files for name in names):
                return  # reported with its name by _check_names
            codes, scales = (files[name].tensors[name].shape for name in names)
            if len(codes) == len(scales) == 2:
                yield names[0], weight.layer_kind, codes[0], scales[0]

    return qkv.infer_chunks(config, shapes())


def _expected(source: HuggingFaceCheckpoint) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for weight in source.weights():
        if source.qkv_order == qkv.SEPARATE and weight.path[-1] == "qkv":
            part = weight.parts[0]
            for name, rows in zip(split_names(part.name), qkv_rows(source.config, weight.layer_kind)):
                yield name, part.dtype, (rows, weight.shape[-1])
            continue
        for part, _, name in tensors_of(weight):
            yield name, part.dtype, part.tensor_shape


def _check_names(source: HuggingFaceCheckpoint) -> None:
    """Every expected tensor is there with its dtype and shape, and no other is."""
    files, directory = source.files, source.directory
    missing, matched = [], 0
    for name, dtype, shape in _expected(source):
        if name not in files:
            missing.append(name)
            if len(missing) > _NAMED:  # a hostile config may expect billions
                break
            continue
        matched += 1
        found = files[name].tensors[name]
        where = f"{files[name].path}: tensor {name!r}"
        if found.shape != shape:
            raise UserError(f"{where} has shape {list(found.shape)}; the config needs {list(shape)}")
        if found.dtype not in (dtype, *_SAME_BYTES.get((dtype, name.rpartition(".")[2]), ())):
            raise UserError(f"{where} is {found.dtype}; expected {dtype}")
    if missing:
        more = " and more" if len(missing) > _NAMED else ""
        raise UserError(f"{directory}: missing {', '.join(missing[:_NAMED])}{more}")
    if matched != len(files):
        known = {name for name, _, _ in _expected(source)}
        extra = [name for name in files if name not in known]
        raise UserError(
            f"{directory}: {len(extra)} tensors that this model does not have: "
            + ", ".join(repr(name[:200]) for name in extra[:_NAMED])
        )


def read_params(
    source: HuggingFaceCheckpoint, sharding_of: ShardingOf | None = None, advance: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """The parameter tree, one leaf at a time. `sharding_of` takes a leaf's path, ("layers_1", "moe", "gate", "codes"),
    and its shape; of a sharded leaf only what this process's devices hold is read.

    `advance` is told the bytes of everything read. On CPU an array takes over its buffer, so nothing is held twice.
    """

    def read(weight: Weight, part: Part) -> jax.Array:
        sharding = sharding_of(array_path(part), part.shape) if sharding_of else None
        return _read_part(source, weight, part, sharding, advance or (lambda nbytes: None))

    return build_tree(source.weights(), read)


def _read_part(
    source: HuggingFaceCheckpoint,
    weight: Weight,
    part: Part,
    sharding: jax.sharding.Sharding | None,
    advance: Callable[[int], None],
) -> jax.Array:
    held: dict[tuple, np.ndarray] = {}

    def read(region: Region | None = None) -> np.ndarray:
        region = region or (slice(None),) * len(part.shape)
        bounds = tuple(span.indices(size)[:2] for span, size in zip(region, part.shape))
        if bounds not in held:  # replicas share one
            held[bounds] = _aligned_empty(tuple(stop - start for start, stop in bounds), DTYPES[part.dtype])
            _fill(source, weight, part, tuple(slice(*bound) for bound in bounds), held[bounds], advance)
        return held[bounds]

    if sharding is None:
        return jax.device_put(read()).block_until_ready()
    return jax.make_array_from_callback(part.shape, sharding, read).block_until_ready()


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A buffer that JAX on CPU adopts without a copy: it wants 64-byte alignment."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)


def _fill(
    source: HuggingFaceCheckpoint,
    weight: Weight,
    part: Part,
    region: Region,
    buffer: np.ndarray,
    advance: Callable[[int], None],
) -> None:
    """Reads the `region` of one array of the tree into `buffer`."""
    first, *rest = region or (slice(None),)
    if weight.path[-1] == "qkv" and source.qkv_order != qkv.INTERLEAVED:
        return _fill_dense_qkv(source, weight, region, buffer, advance)
    if part.split != "stack":
        tensor = source.read(part.name).reshape(part.shape)[region]
        _check_values(source, part, weight, tensor, part.name)
        buffer[...] = tensor
        return _done(source, part.name, tensor.nbytes, advance)
    for index in range(first.start, first.stop):
        name = part.tensor_name(index)
        tensor = source.read(name)[tuple(rest)]
        _check_values(source, part, weight, tensor, name)
        buffer[index - first.start] = tensor
        _done(source, name, tensor.nbytes, advance)


def _check_values(source: HuggingFaceCheckpoint, part: Part, weight: Weight, tensor: np.ndarray, name: str) -> None:
    """Of what was read of a tensor; the error names a place in the whole."""
    where = f"{source.files[name].path}: {name}"
    try:
        check_stored(weight, part, tensor, where)
    except UserError:
        check_stored(weight, part, source.read(name), where)
        raise


def _fill_dense_qkv(
    source: HuggingFaceCheckpoint, weight: Weight, region: Region, buffer: np.ndarray, advance: Callable[[int], None]
) -> None:
    """Chunks `region[0]` of the fused projection, from three tensors or from one that holds [Q | K | V]."""
    chunks, rows, cols = region
    thirds = _qkv_thirds(source, weight)
    parts = [third.reshape(source.config.qkv_chunks, -1, third.shape[-1])[chunks] for _, third in thirds]
    for (name, _), part in zip(thirds, parts):
        _check_values(source, weight.parts[0], weight, part, name)
    buffer[...] = np.concatenate(parts, axis=1)[:, rows, cols]
    for (name, _), part in zip(thirds, parts):
        _done(source, name, part.nbytes, advance)


def _qkv_thirds(source: HuggingFaceCheckpoint, weight: Weight) -> list[tuple[str, np.ndarray]]:
    name = weight.parts[0].name
    if source.qkv_order == qkv.SEPARATE:
        return [(third, source.read(third)) for third in split_names(name)]
    query, key, _ = qkv_rows(source.config, weight.layer_kind)
    return [(name, third) for third in np.split(source.read(name), (query, query + key))]


def _done(source: HuggingFaceCheckpoint, name: str, nbytes: int, advance: Callable[[int], None]) -> None:
    source.files[name].release(name)
    advance(nbytes)


def probe_qkv(source: HuggingFaceCheckpoint, params: dict[str, Any]) -> int:
    """Recomputes one head of Q, K and V from raw bytes for each kind of layer, by the published formula.

    Returns how many heads were compared; a difference from the tree is an error.
    """
    chosen: dict[tuple[str, int, str], Weight] = {}
    for weight in source.weights():
        if weight.path[-2:-1] == ("attention",) and weight.path[-1] in ("qkv", "q", "k", "v"):
            chosen.setdefault((weight.path[0].split("_")[0], weight.layer_kind, weight.path[-1]), weight)
    return qkv.probe(source.config, list(chosen.values()), params, source.qkv_order, source.read)


def read_checkpoint(directory: str | Path, sharding_of: ShardingOf | None = None) -> Checkpoint:
    """A Hugging Face directory, probed; see `read_params` for placement."""
    source = open_checkpoint(Path(directory))
    params = read_params(source, sharding_of)
    probe_qkv(source, params)
    return Checkpoint(source.config, source.file_format, params)
