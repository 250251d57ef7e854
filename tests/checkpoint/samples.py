"""Small checkpoints for the tests, written without the code under test."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from mimo_jax.config.huggingface import to_hf
from mimo_jax.config.model import PUBLISHED, FileFormat, ModelConfig
from mimo_jax.config.presets import preset
from mimo_jax.weights import params

Tensors = dict[str, tuple[str, np.ndarray]]  # name -> (dtype as safetensors spells it, content)

NUMPY = {"U8": np.uint8, "F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


def small(**changes) -> ModelConfig:
    """The bundled model's family at a few hundred kilobytes: a dense, two routed and one MTP layer."""
    geometry = {
        "vocab_size": 96,
        "hidden_size": 64,
        "layer_pattern": (0, 1, 0),
        "moe_pattern": (0, 1, 1),
        "intermediate_size": 160,
        "moe_intermediate_size": 32,
        "num_experts": 4,
    }
    return dataclasses.replace(preset("mimo-tiny"), **{**geometry, **changes})


def random_tensors(config: ModelConfig, file_format: FileFormat = PUBLISHED, seed: int = 0) -> Tensors:
    """Random content for every tensor of the published layout, free of NaN."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, (dtype, shape) in params.expected_tensors(params.weights(config, file_format)).items():
        if dtype in ("U8", "F8_E4M3"):
            data = rng.integers(0, 254, shape, dtype=np.uint8)
            if dtype == "F8_E4M3":
                data[data == 0x7F] = 0
            tensors[name] = dtype, data.view(NUMPY[dtype])
        else:
            tensors[name] = dtype, rng.standard_normal(shape).astype(NUMPY[dtype])
    return tensors


def save_file(path: Path, tensors: Tensors) -> None:
    """One safetensors file: length, header, data, in the order given."""
    header, position = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (position, position + array.nbytes)}
        position += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for _, a in tensors.values()))


def load_file(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes), by the reference implementation."""
    return {
        name: (entry["dtype"], list(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(path.read_bytes())
    }


def save_checkpoint(
    directory: Path, config: ModelConfig, tensors: Tensors, file_format: FileFormat = PUBLISHED, shards: int = 1
) -> Path:
    """A Hugging Face directory of one file, or of several with an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(to_hf(config, file_format)))
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    if shards == 1:
        save_file(directory / "model.safetensors", tensors)
        return directory
    weight_map = {}
    for shard, group in enumerate(np.array_split(np.array(sorted(tensors)), shards), 1):
        file = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        save_file(directory / file, {str(name): tensors[str(name)] for name in group})
        weight_map |= {str(name): file for name in group}
    total = sum(math.prod(array.shape) * array.itemsize for _, array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
