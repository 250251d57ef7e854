"""The folder `audio_tokenizer/` of a checkpoint: the encoder that makes codes of sound. Its decoder is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoint.export import json_bytes
from mimo_jax.checkpoint.files.tensorfile import TensorFile, TensorFileWriter, inside, load_json, read_bytes
from mimo_jax.checkpoint.finite import check_finite
from mimo_jax.checkpoint.manifest import new_directory, write_file
from mimo_jax.config.media import tokenizer_from_hf, tokenizer_to_hf
from mimo_jax.config.towers import AudioTokenizerConfig
from mimo_jax.errors import UserError
from mimo_jax.weights import Params
from mimo_jax.weights.dtypes import DTYPES, HF_DTYPES
from mimo_jax.weights.params import Part, Weight, build_tree, expected_tensors, tokenizer_weights

FOLDER = "audio_tokenizer"
CONFIG, TENSORS = "config.json", "model.safetensors"
# What else lies in the file: the vocoder, and what training kept beside the codebooks.
_OTHERS = ("decoder.",)
_KEPT = ("cluster_size", "embed_avg", "inited")
_FIRST = "encoder.conv1.weight"
_MAX_CONFIG_BYTES = 4_000_000
_NAMED = 3  # how many tensors an error names


def has_audio_tokenizer(directory: Path) -> bool:
    """Whether a checkpoint directory holds one."""
    return (directory / FOLDER / CONFIG).exists()


def audio_tokenizer_files(directory: Path) -> dict[str, Path]:
    """What the folder consists of, by its name in the checkpoint."""
    if not has_audio_tokenizer(directory):
        return {}
    return {f"{FOLDER}/{name}": inside(directory, f"{FOLDER}/{name}") for name in (CONFIG, TENSORS)}


def read_audio_tokenizer(directory: Path) -> tuple[AudioTokenizerConfig, Params]:
    """Config and parameters of the folder `directory`, in the dtypes of its tensors. Every tensor of the encoder is
    used exactly once, or the first that is not is a `UserError`.
    """
    path = inside(directory, CONFIG)
    config = tokenizer_from_hf(load_json(read_bytes(path, _MAX_CONFIG_BYTES), str(path)), str(path))
    file = TensorFile(inside(directory, TENSORS))
    dtype = _dtype_of(file)
    _check_tensors(config, dtype, file)

    def read(weight: Weight, part: Part) -> jax.Array:
        check_finite(file.read(part.name), f"{file.path}: tensor {part.name!r}")
        array = jnp.array(file.read(part.name))  # a copy: the file may change afterwards
        file.release(part.name)
        return array

    return config, build_tree(tokenizer_weights(config, dtype), read)


def _dtype_of(file: TensorFile) -> str:
    if _FIRST not in file.tensors:
        raise UserError(f"{file.path}: missing {_FIRST!r}")
    found = file.tensors[_FIRST].dtype
    ours = next((dtype for dtype, spelling in HF_DTYPES.items() if spelling == found), None)
    if ours is None:
        raise UserError(f"{file.path}: tensor {_FIRST!r} is {found}; expected {' or '.join(HF_DTYPES.values())}")
    return ours


def _check_tensors(config: AudioTokenizerConfig, dtype: str, file: TensorFile) -> None:
    held = {name for name in file.tensors if not name.startswith(_OTHERS) and not name.endswith(_KEPT)}
    expected = expected_tensors(tokenizer_weights(config, dtype))
    for named, found in (("missing", expected.keys() - held), ("unexpected", held - expected.keys())):
        if found:
            names = ", ".join(repr(name[:200]) for name in sorted(found)[:_NAMED])
            raise UserError(f"{file.path}: {named} {names}{' and more' if len(found) > _NAMED else ''}")
    for name, (stored, shape) in expected.items():
        info = file.tensors[name]
        if (info.dtype, info.shape) != (stored, shape):
            found = f"{info.dtype} {list(info.shape)}"
            raise UserError(f"{file.path}: tensor {name!r} is {found}; the config needs {stored} {list(shape)}")


def write_audio_tokenizer(
    directory: Path, config: AudioTokenizerConfig, params: Params, dtype: str = "bfloat16"
) -> None:
    """Writes the folder; nothing called `directory` exists before the end."""
    with new_directory(directory) as folder:
        write_file(folder / CONFIG, json_bytes(tokenizer_to_hf(config)))
        table = list(tokenizer_weights(config, dtype))
        writer = TensorFileWriter(folder / TENSORS, expected_tensors(iter(table)))
        try:
            for weight in table:
                (part,) = weight.parts
                held: Any = weight.of(params)
                writer.write(part.name, np.asarray(held).astype(DTYPES[part.dtype]))
            writer.close()
        finally:
            writer.abort()
