"""Reads a checkpoint of any kind."""

from __future__ import annotations

from pathlib import Path

from mimo_jax.checkpoint.gguf import read_gguf
from mimo_jax.checkpoint.huggingface import Checkpoint, read_checkpoint
from mimo_jax.weights.params import ShardingOf


def read(directory: str | Path, sharding_of: ShardingOf | None = None) -> Checkpoint:
    """A Hugging Face or an Orbax directory; `sharding_of` places arrays, see `huggingface.read_params`. Or a GGUF file,
    whose arrays are NumPy's.
    """
    if Path(directory).is_file():
        return read_gguf(Path(directory))
    if not (Path(directory) / "params").is_dir():
        return read_checkpoint(directory, sharding_of)
    from mimo_jax.checkpoint.orbax import read_orbax  # importing Orbax takes longer than reading a small model

    return read_orbax(directory, sharding_of)
