"""Sharded safetensors: the index that says which file holds a tensor, and files that must lie in their directory."""

from __future__ import annotations

from pathlib import Path

from mimo_jax.checkpoint.tensorfile import FREE_JSON_BYTES, JSON_SHARE, load_json, read_bytes
from mimo_jax.errors import UserError


def read_index(path: Path, directory: Path, held: set[str]) -> dict[str, str]:
    """Tensor name -> file of a sharding index, each of which must be among the `held` names of `directory`."""
    data_bytes = sum((directory / name).stat().st_size for name in held if (directory / name).is_file())
    values = load_json(read_bytes(path, max(FREE_JSON_BYTES, data_bytes // JSON_SHARE)), str(path))
    placed = values.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise UserError(f"{path}: weight_map must map tensor names to file names")
    for shard in sorted(set(placed.values())):
        if not shard.endswith(".safetensors") or Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise UserError(f"{path}: {shard[:200]!r} must be a plain .safetensors file name")
        if shard not in held:
            raise UserError(f"{path}: names {shard[:200]!r}, which is not in the directory")
    return placed


def inside(directory: Path, shard: str) -> Path:
    """The path of a shard, which may be a link but not one that leads out of the directory."""
    path = directory / shard
    if path.is_symlink() and path.resolve().parent != directory.resolve():
        raise UserError(f"{path}: a link out of the directory; copy the files there (hf download --local-dir)")
    return path
