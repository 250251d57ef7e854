"""The published drafter folder `dflash/`: its config, its tensors and the mask vector, read and written.

A sharded or single safetensors file holds all weights of `weights.params` but the mask vector, which is in a file of
`torch.save`. What goes beyond the published format lies in the folder's own folder `extras/`, where no other engine
looks: they read the index, or every safetensors file of the folder itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoint.export import INDEX, json_bytes, tensor_bytes
from mimo_jax.checkpoint.files.tensorfile import TensorFile, TensorFileWriter, inside, load_json, read_bytes, read_index
from mimo_jax.checkpoint.files.torchfile import TorchFile, TorchTensor, torch_file
from mimo_jax.checkpoint.finite import check_finite
from mimo_jax.checkpoint.manifest import new_directory, place_file, read_manifest, write_file, write_manifest
from mimo_jax.config.dflash import drafter_from_hf, drafter_to_hf, extras_of, with_extras
from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.errors import UserError
from mimo_jax.weights.dtypes import DTYPES, HF_DTYPES
from mimo_jax.weights.params import (
    MASK,
    Part,
    Weight,
    build_tree,
    drafter_extras,
    drafter_weights,
    expected_tensors,
    path_names,
)

FOLDER = "dflash"
CONFIG = "config.json"
TENSORS = "dflash_draft_model.safetensors"
MASK_FILE = "mask_embedding.pt"
EXTRAS = "extras"  # folder in the drafter's
EXTRA_TENSORS = "extras.safetensors"
_INDEXES = (f"{TENSORS}.index.json", INDEX)
_STEMS = ("dflash_draft_model", "model")
_PREFIX = "model."  # that some exports put before every name
_DATA = (".json", ".pt", ".safetensors")
_MAX_CONFIG_BYTES = 4_000_000
_MASK_OVERHEAD_BYTES = 1 << 20
_NAMED = 3  # how many tensors an error names


def expected_drafter_tensors(config: DrafterConfig, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of the published safetensors."""
    return expected_tensors(_published(config, dtype))


def _published(config: DrafterConfig, dtype: str) -> Iterator[Weight]:
    """Weights of the published safetensors: all but the mask vector and the extras."""
    return (weight for weight in drafter_weights(config.published, dtype) if weight.row is not MASK)


def has_drafter(directory: Path) -> bool:
    """Whether a checkpoint directory holds a drafter."""
    return (directory / FOLDER / CONFIG).exists()


def has_extras(directory: Path) -> bool:
    """Whether a `dflash/` folder holds more than the published format."""
    return (directory / EXTRAS / CONFIG).exists()


def read_drafter(directory: Path, extras: bool = True) -> tuple[DrafterConfig, dict[str, Any]]:
    """Config and parameters of a `dflash/` folder, in the dtype of its tensors; nothing in it is executed.

    Without `extras` it is the published drafter alone, as other engines read it. The tree is that of
    `modeling.dflash.init_drafter`. Every tensor is used exactly once, or the first that is not is a `UserError`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: not found; expected a drafter's folder")
    config = drafter_from_hf(*_read_config(directory, CONFIG))
    held = _open_files(directory)
    dtype = _dtype_of(held, directory)
    _check_tensors(_published(config, dtype), held, directory)
    if extras and has_extras(directory):
        config = with_extras(config, *_read_config(directory, f"{EXTRAS}/{CONFIG}"))
        file = TensorFile(inside(directory, f"{EXTRAS}/{EXTRA_TENSORS}"))
        added = {name: (file, name) for name in file.tensors}
        _check_tensors(drafter_extras(config, dtype), added, directory / EXTRAS)
        held |= added

    def read(weight: Weight, part: Part) -> jax.Array:
        if weight.row is MASK:
            return jnp.array(_read_mask(inside(directory, MASK_FILE), config, dtype))
        file, stored = held[part.name]
        check_finite(file.read(stored), f"{file.path}: tensor {stored!r}")
        array = jnp.array(file.read(stored))  # a copy: the file may change afterwards
        file.release(stored)
        return array

    return config, build_tree(drafter_weights(config, dtype), read)


def _read_config(directory: Path, name: str) -> tuple[dict[str, Any], str]:
    """What a config says, and where."""
    path = inside(directory, name)
    return load_json(read_bytes(path, _MAX_CONFIG_BYTES), str(path)), str(path)


def _open_files(directory: Path) -> dict[str, tuple[TensorFile, str]]:
    """Published tensor name -> (file, name in it), over one file or all that an index names."""
    present = {path.name for path in directory.iterdir() if path.suffix == ".safetensors"}
    index = next((inside(directory, name) for name in _INDEXES if (directory / name).exists()), None)
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
    name = "fc.weight"
    if name not in held:
        raise UserError(f"{directory}: missing {name!r}")
    file, stored = held[name]
    found = file.tensors[stored].dtype
    ours = next((dtype for dtype, spelling in HF_DTYPES.items() if spelling == found), None)
    if ours is None:
        raise UserError(f"{file.path}: tensor {stored!r} is {found}; expected {' or '.join(HF_DTYPES.values())}")
    return ours


def _check_tensors(table: Iterator[Weight], held: dict[str, tuple[TensorFile, str]], directory: Path) -> None:
    """Every tensor of the table is there with its dtype and shape, and no other is."""
    missing: list[str] = []
    matched: set[str] = set()
    for weight in table:
        (part,) = weight.parts
        name = part.name
        if name not in held:
            missing.append(name)
            if len(missing) > _NAMED:  # a hostile config may expect billions
                break
            continue
        matched.add(name)
        file, stored = held[name]
        found = file.tensors[stored]
        where = f"{file.path}: tensor {stored!r}"
        if found.shape != part.shape:
            raise UserError(f"{where} has shape {list(found.shape)}; the config needs {list(part.shape)}")
        if found.dtype != part.dtype:
            raise UserError(f"{where} is {found.dtype}; expected {part.dtype}")
    if missing:
        raise UserError(f"{directory}: missing {_quoted(missing)}")
    if extra := sorted(set(held) - matched):
        raise UserError(f"{directory}: unexpected {_quoted(extra)}; a drafter shares its target's other weights")


def _read_mask(path: Path, config: DrafterConfig, dtype: str) -> np.ndarray:
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
    return _cast(file.read(vector).reshape(-1), dtype, f"{path}: embedding")


def _cast(array: Any, dtype: str, where: str) -> np.ndarray:
    """`array` in the dtype of the folder, in which all of it must be finite."""
    with np.errstate(invalid="ignore", over="ignore"):  # numpy warns where a NaN is cast
        cast = np.asarray(array).astype(DTYPES[HF_DTYPES[dtype]])
    check_finite(cast, where)
    return cast


def write_drafter(directory: Path, config: DrafterConfig, params: dict[str, Any], dtype: str = "bfloat16") -> None:
    """Writes config, tensors and mask vector as `dtype`, and extras; nothing called `directory` exists before the end.

    An existing directory is a `UserError`.
    """
    with new_directory(Path(directory)) as folder:
        _fill(folder, config, params, dtype)


def attach_drafter(checkpoint: Path, config: DrafterConfig, params: dict[str, Any], dtype: str = "bfloat16") -> None:
    """Puts a drafter into a checkpoint that this package wrote, in place of the one it has; all of it or nothing."""
    with new_directory(checkpoint, overwrite=True) as folder:
        manifest = read_manifest(checkpoint)
        kept = {name: entry for name, entry in manifest["files"].items() if not name.startswith(f"{FOLDER}/")}
        for name in kept:
            place_file(folder / name, inside(checkpoint, name))
        (folder / FOLDER).mkdir()
        _fill(folder / FOLDER, config, params, dtype)
        write_manifest(folder, manifest["kind"], manifest["tensors"], lambda nbytes: None, kept)


def drafter_files(directory: Path) -> dict[str, Path]:
    """What the drafter folder of a checkpoint consists of, by its name in the checkpoint. Code is left out."""
    if not has_drafter(directory):
        return {}
    folders = (FOLDER, f"{FOLDER}/{EXTRAS}") if has_extras(directory / FOLDER) else (FOLDER,)
    paths = [path for folder in folders for path in sorted((directory / folder).iterdir())]
    names = [path.relative_to(directory).as_posix() for path in paths if path.suffix in _DATA]
    return {name: inside(directory, name) for name in names}


def _fill(folder: Path, config: DrafterConfig, params: dict[str, Any], dtype: str) -> None:
    held = {"/".join(path_names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if differing := sorted(held ^ {weight.label for weight in drafter_weights(config, dtype)}):
        raise ValueError(f"parameters and config differ in {', '.join(differing)}")
    mask = _cast(params[MASK.path], dtype, MASK.path)
    if mask.shape != (config.hidden_size,):
        raise ValueError(f"mask: shape {mask.shape}, the config has {config.hidden_size}")
    specs = expected_drafter_tensors(config, dtype)
    total = sum(tensor_bytes(spec) for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(specs, TENSORS)}
    write_file(folder / CONFIG, json_bytes(drafter_to_hf(config, dtype)))
    write_file(folder / INDEX, json_bytes(index))
    write_file(folder / MASK_FILE, torch_file({"mask_token_id": config.mask_token_id, "embedding": mask}))
    _write_tensors(folder / TENSORS, list(_published(config, dtype)), params, dtype)
    if config.has_extras:
        (folder / EXTRAS).mkdir()
        write_file(folder / EXTRAS / CONFIG, json_bytes(extras_of(config)))
        _write_tensors(folder / EXTRAS / EXTRA_TENSORS, list(drafter_extras(config, dtype)), params, dtype)


def _write_tensors(path: Path, table: Sequence[Weight], params: dict[str, Any], dtype: str) -> None:
    writer = TensorFileWriter(path, expected_tensors(iter(table)))
    try:
        for weight in table:
            name = weight.parts[0].name
            writer.write(name, _cast(weight.of(params), dtype, name))
        writer.close()
    finally:
        writer.abort()
