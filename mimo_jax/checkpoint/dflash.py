"""The published drafter folder `dflash/`: its config, its tensors and the mask vector, read and written.

One table says where a weight sits in the parameter tree, what it is called on disk and what its axes are. A sharded or
single safetensors file holds all of them but the mask vector, which is in a file of `torch.save`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoint.export import json_bytes
from mimo_jax.checkpoint.manifest import new_directory, place_file, read_manifest, write_file, write_manifest
from mimo_jax.checkpoint.names import HF_DTYPES
from mimo_jax.checkpoint.shards import inside, read_index
from mimo_jax.checkpoint.tensorfile import DTYPES, TensorFile, TensorFileWriter, load_json, read_bytes
from mimo_jax.checkpoint.torchfile import TorchFile, TorchTensor, torch_file
from mimo_jax.drafter_config import LONGEST_MATCH, DrafterConfig
from mimo_jax.errors import UserError
from mimo_jax.hf_drafter_config import drafter_from_hf, drafter_to_hf

FOLDER = "dflash"
CONFIG = "config.json"
TENSORS = "dflash_draft_model.safetensors"
MASK = "mask_embedding.pt"
_INDEXES = (f"{TENSORS}.index.json", "model.safetensors.index.json")
_STEMS = ("dflash_draft_model", "model")
_PREFIX = "model."  # that some exports put before every name
_MAX_CONFIG_BYTES = 4_000_000
_MASK_OVERHEAD_BYTES = 1 << 20
_NAMED = 3  # how many tensors an error names

# (path in the tree, name on disk, axes). Axis letters are those of `mimo_jax/glossary.md`; Z is the taps side by side,
# W the rank of the order-aware bias, which published drafters do not have.
_TOP = (
    ("fuse", "fc.weight", "D Z"),
    ("context_norm/weight", "hidden_norm.weight", "D"),
    ("norm/weight", "norm.weight", "D"),
)
_LAYER = (
    ("input_norm/weight", "input_layernorm.weight", "D"),
    ("attention/q", "self_attn.q_proj.weight", "HQ D"),
    ("attention/k", "self_attn.k_proj.weight", "KQ D"),
    ("attention/v", "self_attn.v_proj.weight", "KQ D"),
    ("attention/o", "self_attn.o_proj.weight", "D HQ"),
    ("attention/q_norm/weight", "self_attn.q_norm.weight", "Q"),
    ("attention/k_norm/weight", "self_attn.k_norm.weight", "Q"),
    ("post_norm/weight", "post_attention_layernorm.weight", "D"),
    ("mlp/gate", "mlp.gate_proj.weight", "F D"),
    ("mlp/up", "mlp.up_proj.weight", "F D"),
    ("mlp/down", "mlp.down_proj.weight", "D F"),
)
_SINK = (("attention/sink", "self_attn.attention_sink_bias", "H"),)
_BIAS = (("bias_in", "markov_in.weight", "C W"), ("bias_out", "markov_out.weight", "C W"))
_LOOKUP = (("guess", "lookup_guess.weight", "D D"), ("matched", "lookup_matched.weight", "M D"))
_MASK_PATH = "mask"


def _rows(config: DrafterConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(path, name, shape) of every tensor, lazily: a config that asks for billions costs nothing by itself."""
    sizes = {
        "C": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_heads,
        "HQ": config.num_heads * config.head_dim,
        "KQ": config.num_kv_heads * config.head_dim,
        "Q": config.head_dim,
        "M": LONGEST_MATCH + 1,
        "W": config.bias_rank,
        "Z": len(config.target_layer_ids) * config.hidden_size,
    }
    layer = _LAYER + (_SINK if config.has_sink else ())
    for path, name, axes in _TOP + (_BIAS if config.bias_rank else ()) + (_LOOKUP if config.lookup else ()):
        yield path, name, tuple(sizes[axis] for axis in axes.split())
    for index in range(config.num_layers):
        for path, name, axes in layer:
            yield f"layers_{index}/{path}", f"layers.{index}.{name}", tuple(sizes[axis] for axis in axes.split())


def expected_drafter_tensors(config: DrafterConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of the folder's safetensors."""
    return {name: (HF_DTYPES[config.param_dtype], shape) for _, name, shape in _rows(config)}


def has_drafter(directory: Path) -> bool:
    """Whether a checkpoint directory holds a drafter."""
    return (directory / FOLDER / CONFIG).exists()


def read_drafter(directory: Path) -> tuple[DrafterConfig, dict[str, Any]]:
    """Config and parameters of a `dflash/` folder, in the dtype of its tensors; nothing in it is executed.

    The tree is that of `init_drafter`. Every tensor is used exactly once, or the first that is not is a `UserError`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: not found; expected a drafter's folder")
    path = directory / CONFIG
    config = drafter_from_hf(load_json(read_bytes(path, _MAX_CONFIG_BYTES), str(path)), str(path))
    held = _open_files(directory)
    config = dataclasses.replace(config, param_dtype=_dtype_of(held, directory))
    _check_tensors(config, held, directory)
    flat: dict[str, jax.Array] = {_MASK_PATH: jnp.array(_read_mask(directory / MASK, config))}
    for leaf, name, _ in _rows(config):
        file, stored = held[name]
        flat[leaf] = jnp.array(file.read(stored))  # a copy: the file may change afterwards
        file.release(stored)
    return config, flax.traverse_util.unflatten_dict(flat, sep="/")


def _open_files(directory: Path) -> dict[str, tuple[TensorFile, str]]:
    """Published tensor name -> (file, name in it), over one file or all that an index names."""
    present = {path.name for path in directory.iterdir() if path.suffix == ".safetensors"}
    index = next((directory / name for name in _INDEXES if (directory / name).exists()), None)
    placed = read_index(index, directory, present) if index else None
    if placed is None and (len(present) != 1 or not min(present).startswith(_STEMS)):
        found = _quoted(sorted(present)) or "no safetensors file"
        raise UserError(f"{directory}: expected {TENSORS} or {_INDEXES[0]}, found {found}")
    shards = set(placed.values()) if placed else present
    if present - shards:
        raise UserError(f"{directory / min(present - shards)}: not named by {index and index.name}")
    files = {shard: TensorFile(inside(directory, shard)) for shard in sorted(shards)}
    if placed is not None:
        stored = {(name, shard) for shard, file in files.items() for name in file.tensors}
        if astray := {name for name, _ in stored ^ set(placed.items())}:
            raise UserError(f"{index}: disagrees with the files about {_quoted(sorted(astray))}")
    held: dict[str, tuple[TensorFile, str]] = {}
    for file in files.values():
        for stored in file.tensors:
            name = stored.removeprefix(_PREFIX)
            if name in held:
                raise UserError(f"{file.path}: tensor {name[:200]!r} is there twice")
            held[name] = file, stored
    return held


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:200]) for name in names[:_NAMED]) + (" and more" if len(names) > _NAMED else "")


def _dtype_of(held: dict[str, tuple[TensorFile, str]], directory: Path) -> str:
    """What the first tensor of the table is stored as, which all must share."""
    name = _TOP[0][1]
    if name not in held:
        raise UserError(f"{directory}: missing {name!r}")
    file, stored = held[name]
    found = file.tensors[stored].dtype
    ours = next((dtype for dtype, spelling in HF_DTYPES.items() if spelling == found), None)
    if ours is None:
        raise UserError(f"{file.path}: tensor {stored!r} is {found}; expected {' or '.join(HF_DTYPES.values())}")
    return ours


def _check_tensors(config: DrafterConfig, held: dict[str, tuple[TensorFile, str]], directory: Path) -> None:
    """Every expected tensor is there with its dtype and shape, and no other is."""
    missing: list[str] = []
    matched: set[str] = set()
    for _, name, shape in _rows(config):
        if name not in held:
            missing.append(name)
            if len(missing) > _NAMED:  # a hostile config may expect billions
                break
            continue
        matched.add(name)
        file, stored = held[name]
        found, dtype = file.tensors[stored], HF_DTYPES[config.param_dtype]
        where = f"{file.path}: tensor {stored!r}"
        if found.shape != shape:
            raise UserError(f"{where} has shape {list(found.shape)}; the config needs {list(shape)}")
        if found.dtype != dtype:
            raise UserError(f"{where} is {found.dtype}; expected {dtype}")
    if missing:
        raise UserError(f"{directory}: missing {_quoted(missing)}")
    if extra := sorted(set(held) - matched):
        raise UserError(f"{directory}: unexpected {_quoted(extra)}; a drafter shares its target's other weights")


def _read_mask(path: Path, config: DrafterConfig) -> np.ndarray:
    """The vector [D] that stands in for a drafted position, in the dtype of the other parameters."""
    file = TorchFile(path, limit=_MASK_OVERHEAD_BYTES + 4 * config.hidden_size)
    token, vector = file.values.get("mask_token_id"), file.values.get("embedding")
    if type(token) is not int or token != config.mask_token_id:
        found = token if type(token) is int and abs(token) < 2**63 else f"of type {type(token).__name__}"
        raise UserError(f"{path}: mask_token_id is {found}; {CONFIG} has mask_token_id={config.mask_token_id}")
    if not isinstance(vector, TorchTensor):
        raise UserError(f"{path}: embedding is of type {type(vector).__name__}; expected a tensor")
    if vector.shape not in ((config.hidden_size,), (1, config.hidden_size)):
        raise UserError(f"{path}: embedding has shape {list(vector.shape)}; the config needs [{config.hidden_size}]")
    if vector.dtype not in HF_DTYPES.values():
        raise UserError(f"{path}: embedding is {vector.dtype}; expected {' or '.join(HF_DTYPES.values())}")
    return _cast(file.read(vector).reshape(-1), config)


def _cast(array: Any, config: DrafterConfig) -> np.ndarray:
    """`array` in the dtype of the folder."""
    with np.errstate(invalid="ignore", over="ignore"):  # numpy warns where a NaN is cast
        return np.asarray(array).astype(DTYPES[HF_DTYPES[config.param_dtype]])


def write_drafter(directory: Path, config: DrafterConfig, params: dict[str, Any]) -> None:
    """Writes config, tensors and mask vector in `config.param_dtype`; nothing called `directory` exists before the end.

    An existing directory is a `UserError`.
    """
    with new_directory(Path(directory)) as folder:
        _fill(folder, config, params)


def attach_drafter(checkpoint: Path, config: DrafterConfig, params: dict[str, Any]) -> None:
    """Puts a drafter into a checkpoint that this package wrote, in place of the one it has; all of it or nothing."""
    manifest = read_manifest(checkpoint)
    kept = [name for name in manifest["files"] if not name.startswith(f"{FOLDER}/")]
    with new_directory(checkpoint, overwrite=True) as folder:
        for name in kept:
            place_file(folder / name, checkpoint / name)
        (folder / FOLDER).mkdir()
        _fill(folder / FOLDER, config, params)
        write_manifest(folder, manifest["kind"], manifest["tensors"], lambda nbytes: None)


def drafter_files(directory: Path) -> dict[str, Path]:
    """What the drafter folder of a checkpoint consists of, by its name in the checkpoint. Code is left out."""
    wanted = {".json", ".pt", ".safetensors"}
    folder = directory / FOLDER
    paths = sorted(path for path in folder.iterdir() if path.suffix in wanted) if has_drafter(directory) else []
    return {f"{FOLDER}/{path.name}": inside(folder, path.name) for path in paths}


def _fill(folder: Path, config: DrafterConfig, params: dict[str, Any]) -> None:
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    if differing := sorted(set(flat) ^ {_MASK_PATH, *(path for path, _, _ in _rows(config))}):
        raise ValueError(f"parameters and config differ in {', '.join(differing)}")
    mask = _cast(flat[_MASK_PATH], config)
    if mask.shape != (config.hidden_size,):
        raise ValueError(f"mask: shape {mask.shape}, the config has {config.hidden_size}")
    write_file(folder / CONFIG, json_bytes(drafter_to_hf(config)))
    write_file(folder / MASK, torch_file({"mask_token_id": config.mask_token_id, "embedding": mask}))
    writer = TensorFileWriter(folder / TENSORS, expected_drafter_tensors(config))
    try:
        for path, name, _ in _rows(config):
            writer.write(name, _cast(flat[path], config))
        writer.close()
    finally:
        writer.abort()
