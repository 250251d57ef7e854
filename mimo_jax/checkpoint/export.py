"""Writes parameters as a Hugging Face directory in the published FP4-DFlash layout.

Packed experts and FP8 linears are carried byte for byte; anything dense is quantised on the way, one expert at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.checkpoint.files.tensorfile import TensorFileWriter, as_bytes
from mimo_jax.checkpoint.finite import check_stored
from mimo_jax.checkpoint.manifest import new_directory, place_file, write_manifest
from mimo_jax.config.huggingface import to_hf
from mimo_jax.config.model import PUBLISHED, ModelConfig
from mimo_jax.weights import BlockFp8Tensor, MxTensor, encode
from mimo_jax.weights.dtypes import DTYPES
from mimo_jax.weights.params import MTP_PREFIX, weights

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
MTP_FILE = "model_mtp.safetensors"

Specs = dict[str, tuple[str, tuple[int, ...]]]


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    params: dict[str, Any],
    extra_files: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config, generation config, shards, index, `extra_files` (name -> content or file) and, last, the manifest.

    `params` may be of any file format. Nothing called `directory` exists until everything is on disk.
    """
    with new_directory(Path(directory), overwrite) as folder:
        fill_checkpoint(folder, config, params, extra_files or {}, advance or (lambda nbytes: None), shard_bytes)


def fill_checkpoint(
    folder: Path,
    config: ModelConfig,
    params: dict[str, Any],
    extra_files: Mapping[str, bytes | Path],
    advance: Callable[[int], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`write_checkpoint`'s content, in the folder of `new_directory`."""
    PUBLISHED.check_fits(config)
    shards = _plan_shards(config, shard_bytes)
    placed = {name: file for file, specs in shards.items() for name in specs}
    total = sum(tensor_bytes(spec) for specs in shards.values() for spec in specs.values())
    files = {
        "config.json": json_bytes(to_hf(config, PUBLISHED)),
        "generation_config.json": json_bytes(_generation_config(config)),
        INDEX: json_bytes({"metadata": {"total_size": total}, "weight_map": placed}),
        **extra_files,
    }
    for name, data in files.items():
        place_file(folder / name, data)
    digests = _write_shards(folder, shards, placed, config, params, advance)
    write_manifest(folder, "huggingface", digests, lambda nbytes: None)


def json_bytes(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def tensor_bytes(spec: tuple[str, tuple[int, ...]]) -> int:
    return DTYPES[spec[0]].itemsize * math.prod(spec[1])


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def _plan_shards(config: ModelConfig, shard_bytes: int) -> dict[str, Specs]:
    """File name -> its tensors. The MTP layers have their own file; one expert's parts stay together."""
    groups: list[Specs] = [{}]
    mtp: Specs = {}
    held = 0
    for weight in weights(config, PUBLISHED):
        for index in range(weight.parts[0].count):
            specs = {part.tensor_name(index): (part.dtype, part.tensor_shape) for part in weight.parts}
            if next(iter(specs)).startswith(MTP_PREFIX):
                mtp |= specs
                continue
            size = sum(tensor_bytes(spec) for spec in specs.values())
            if groups[-1] and held + size > shard_bytes:
                groups.append({})
                held = 0
            groups[-1] |= specs
            held += size
    shards = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": specs for i, specs in enumerate(groups, 1)}
    return shards | ({MTP_FILE: mtp} if mtp else {})


def _write_shards(
    folder: Path,
    shards: dict[str, Specs],
    placed: dict[str, str],
    config: ModelConfig,
    params: dict[str, Any],
    advance: Callable[[int], None],
) -> dict[str, str]:
    """Streams every tensor into its shard; returns the SHA-256 of each."""
    digests: dict[str, str] = {}
    writer: TensorFileWriter | None = None
    try:
        for name, array in _tensors(config, params):
            if writer is None or writer.path.name != placed[name]:  # the plan follows the order of the tensors
                if writer is not None:
                    writer.close()
                writer = TensorFileWriter(folder / placed[name], shards[placed[name]])
            data = np.ascontiguousarray(array)  # once, for both
            writer.write(name, data)
            digests[name] = hashlib.sha256(as_bytes(data)).hexdigest()
            advance(data.nbytes)
        if writer is not None:
            writer.close()
    finally:
        if writer is not None:
            writer.abort()
    return digests


def _tensors(config: ModelConfig, params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and content of every tensor, in the order of the table."""
    for weight in weights(config, PUBLISHED):
        leaf = _on_host(weight.of(params))
        for index in range(weight.parts[0].count):
            label = weight.parts[0].tensor_name(index)
            leaf_at = leaf[index] if weight.parts[0].split == "stack" else leaf
            with np.errstate(invalid="ignore", over="ignore"):  # the check below says what numpy would warn of
                stored: Any = encode(leaf_at, weight.stored, DTYPES[weight.parts[0].dtype], label)
            for part in weight.parts:
                array = (getattr(stored, part.field) if part.field else stored).reshape(part.tensor_shape)
                check_stored(weight, part, array, part.tensor_name(index))
                yield part.tensor_name(index), array


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, MxTensor | BlockFp8Tensor):
        return type(leaf)(np.asarray(leaf.codes), np.asarray(leaf.scales))
    return np.asarray(leaf)
