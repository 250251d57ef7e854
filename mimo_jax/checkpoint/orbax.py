"""Orbax checkpoints (the v1 API): a directory appears by rename when it is complete, and is always restored through an
abstract tree, so that the same checkpoint opens on any number of devices.

A converted model is a directory of `params/` (the Orbax tree), `config.json`, the tokenizer's files and a manifest. A
training run keeps one directory per step, of `state/` (the Orbax tree) and a manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from mimo_jax.checkpoint.export import json_bytes
from mimo_jax.checkpoint.files.tensorfile import as_bytes
from mimo_jax.checkpoint.finite import check_leaves
from mimo_jax.checkpoint.huggingface import Checkpoint, read_hf_config, read_torch_dtype
from mimo_jax.checkpoint.manifest import (
    check_whole,
    new_directory,
    partial_of,
    place_file,
    read_manifest,
    remove_all,
    remove_leftovers,
    verify_files,
    write_manifest,
)
from mimo_jax.config.huggingface import to_hf
from mimo_jax.config.model import FileFormat, ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.weights.params import ShardingOf, abstract_tree, weights

PARAMS, STATE = "params", "state"
_IN_FLIGHT_BYTES = 32 << 20
_CHUNK_BYTES = 64 << 20  # a 2.4 GB expert stack in one chunk takes four times as long to write
_LEFTOVER = ".orbax-checkpoint-tmp"
_STEP = re.compile("[0-9]{8}|[1-9][0-9]{8,}")


@contextmanager
def _settings(tree: Any, partial_load: bool = False) -> Iterator[None]:
    """Few bytes in flight, no compression (weights do not shrink), and no traceback in the log beside our one line."""
    # A limit that the largest array does not stay below is an error, not a slower transfer.
    limit = _IN_FLIGHT_BYTES + max(map(_leaf_bytes, jax.tree.leaves(tree)), default=0)
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.memory.write_concurrent_bytes = limit
    context.memory.read_concurrent_bytes = limit
    context.pytree.loading.partial_load = partial_load
    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    before = [logger.level for logger in loggers], sys.unraisablehook, threading.excepthook
    filters = warnings.catch_warnings()
    filters.__enter__()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = threading.excepthook = lambda _: None
    with context:
        yield
    # Only now: after a failure Orbax's remaining threads still end, each with a traceback of its own.
    levels, sys.unraisablehook, threading.excepthook = before
    filters.__exit__(None, None, None)
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


def _leaf_bytes(leaf: Any) -> int:
    return math.prod(np.shape(leaf)) * np.dtype(getattr(leaf, "dtype", np.float64)).itemsize


def save_tree(path: Path, tree: Any, metadata: dict | None = None) -> None:
    """Writes `tree` to the new directory `path`; until the last rename, nothing called `path` exists."""
    try:
        with _settings(tree):
            ocp.save(path.absolute(), tree, custom_metadata=metadata)
    except Exception as error:  # the libraries below raise everything, bare Exception included
        remove_all(path.parent.glob(f"{path.name}{_LEFTOVER}*"))
        raise UserError(f"{path}: could not be written ({_reason(error)})") from None


def restore_tree(path: Path, abstract: Any, partial_load: bool = False) -> Any:
    """Reads a tree of `jax.ShapeDtypeStruct` leaves; those without a sharding land on the first device."""
    if not path.is_dir():
        raise UserError(f"{path}: not found; expected an Orbax checkpoint directory")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here), abstract
    )
    try:
        with _settings(placed, partial_load):
            return ocp.load(path.absolute(), placed)
    except Exception as error:  # the libraries below raise everything, bare Exception included
        raise UserError(f"{path}: not a complete checkpoint of this model ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """One short line: the operating system's word if there is one, else the first of the library's."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    text = getattr(error, "strerror", None) or str(error).strip() or repr(error)
    return text.splitlines()[0][:300]


def steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint below `directory`, oldest first."""
    if not directory.is_dir():
        return []
    names = [entry.name for entry in directory.iterdir() if _STEP.fullmatch(entry.name) and entry.is_dir()]
    return sorted(map(int, names))


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"{step:08d}"


def save_step(directory: Path, step: int, tree: Any, keep: int = 2) -> None:
    """Saves `directory/step` and drops all but the newest `keep`. A kill at any point leaves only complete steps.

    Of several processes all put their shards in; the first makes the directory, lists the files' digests and clears up.
    """
    is_first = jax.process_index() == 0
    if is_first:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
    if step not in steps(directory):
        path = step_directory(directory, step)
        with new_directory(path) if is_first else nullcontext(partial_of(path)) as folder:
            save_tree(folder / STATE, tree)
            if is_first:
                write_manifest(folder, "step", {}, lambda nbytes: None)
    if is_first:
        _drop_old(directory, keep)


def _drop_old(directory: Path, keep: int) -> None:
    for old in steps(directory)[:-keep]:
        # Out of sight first: deleting in place would leave a listed step that cannot be restored.
        with suppress(FileNotFoundError):  # another process was faster
            step_directory(directory, old).rename(directory / f"trash-{old:08d}")
    remove_all(directory.glob("trash-*"))


def restore_step(path: Path, abstract: Any) -> Any:
    """One step's tree, after a look at all its files."""
    if jax.process_index() == 0:
        verify_files(path, read_manifest(path), lambda nbytes: None)
    return restore_tree(path / STATE, abstract)


def restore_latest(directory: Path, abstract: Any) -> Any:
    """The newest step's tree. A damaged one is an error: whoever goes on from the step before should know it."""
    found = steps(directory)
    if not found:
        raise UserError(f"{directory}: holds no complete checkpoint")
    newest = step_directory(directory, found[-1])
    try:
        return restore_step(newest, abstract)
    except UserError as error:
        before = f"remove {newest} to go on from step {found[-2]}" if found[1:] else "there is no step before it"
        raise UserError(f"{error}; {before}") from None


def write_orbax(
    directory: str | Path,
    config: ModelConfig,
    file_format: FileFormat,
    params: dict[str, Any],
    extra_files: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Writes a model directory; nothing called `directory` exists until everything is on disk."""
    with new_directory(Path(directory), overwrite) as folder:
        fill_orbax(folder, config, file_format, params, extra_files or {}, advance or (lambda nbytes: None))


def fill_orbax(
    folder: Path,
    config: ModelConfig,
    file_format: FileFormat,
    params: dict[str, Any],
    extra_files: Mapping[str, bytes | Path],
    advance: Callable[[int], None],
) -> None:
    """`write_orbax`'s content, in the folder of `new_directory`."""
    check_leaves(weights(config, file_format), params, str(folder))
    described = json_bytes(to_hf(config, file_format))
    for name, data in {**extra_files, "config.json": described}.items():
        place_file(folder / name, data)
    save_tree(folder / PARAMS, params)
    write_manifest(folder, "orbax", leaf_digests(params), advance)


def leaf_digests(params: Any) -> dict[str, str]:
    """SHA-256 of every leaf's bytes, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _digest(leaf) for path, leaf in leaves}


def _digest(leaf: Any) -> str:
    return hashlib.sha256(as_bytes(_on_host(leaf))).hexdigest()


def _on_host(leaf: Any) -> np.ndarray:
    """A whole leaf. Not by `np.asarray` if it lies in parts: JAX would keep what it puts together."""
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return np.asarray(leaf)
    whole = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        whole[shard.index] = shard.data
    return whole


def read_orbax_config(directory: Path) -> tuple[ModelConfig, FileFormat]:
    """The config of a model directory, and how it stores weights."""
    config, file_format = read_hf_config(directory)
    return config, dataclasses.replace(file_format, dtype=read_torch_dtype(directory) or file_format.dtype)


def read_orbax(directory: str | Path, sharding_of: ShardingOf | None = None) -> Checkpoint:
    """A model directory, onto the first device or wherever `sharding_of` says.

    The manifest must be there and whole (it is written last), every file have its size and the small ones their digest;
    those of the data are `verify`'s business.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: not found; expected a checkpoint directory")
    check_whole(directory, read_manifest(directory))
    config, file_format = read_orbax_config(directory)
    abstract = abstract_tree(weights(config, file_format), sharding_of)
    params = restore_tree(directory / PARAMS, abstract)
    check_leaves(weights(config, file_format), params, str(directory))
    return Checkpoint(config, file_format, params)


def verify_leaves(directory: Path, digests: dict[str, str]) -> None:
    """Restores the tree branch by branch and compares every leaf with its digest."""
    abstract = abstract_tree(weights(*read_orbax_config(directory)))
    found: dict[str, str] = {}
    for key, branch in abstract.items():
        found |= leaf_digests(restore_tree(directory / PARAMS, {key: branch}, partial_load=True))
    for name in sorted(found.keys() | digests.keys()):
        if found.get(name) != digests.get(name):
            raise UserError(f"{directory}: tensor {name} differs from the manifest's SHA-256")
