"""A dense Llama-type GGUF as a MiMo model that computes the same: MiMo's form, not MiMo's sparsity.

An MLP is a sum over its hidden units, so equal parts of it are experts. All of them are chosen, with equal scores: the
router is 0, and `down` is stored times the number of experts, which is exact for a power of two. All layers are global,
rotary positions cover the whole head, there are no sinks, and an embedding that is the head, too, is stored twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.checkpoint.export import fill_checkpoint
from mimo_jax.checkpoint.files.gguffile import GgufFile
from mimo_jax.checkpoint.huggingface import Checkpoint
from mimo_jax.checkpoint.llama import config_of, vocabulary_of
from mimo_jax.checkpoint.manifest import new_directory
from mimo_jax.cli.progress import progress
from mimo_jax.config.model import MASTERS, PUBLISHED, ModelConfig
from mimo_jax.weights import Params
from mimo_jax.weights.params import array_bytes, weights


def read_gguf(path: Path) -> Checkpoint:
    """A GGUF as other checkpoints are read; its weights are float32, as exact as the file's."""
    file = GgufFile(path)
    config = config_of(file, vocabulary_of(file))
    return Checkpoint(config, MASTERS, jax.tree.map(np.asarray, params_of(file, config)))


def gguf_files(path: Path, sampling: Mapping[str, Any] | None = None) -> dict[str, bytes | Path]:
    """What goes along with its weights: the files of tokenizer, chat template and generation config, which says
    `sampling`, too.
    """
    return dict(vocabulary_of(GgufFile(path)).files(sampling))


def from_gguf(source: Path, destination: Path, overwrite: bool = False) -> dict[str, Any]:
    """Writes a GGUF in the FP4-DFlash layout, plainly rounded, with one weight in memory at a time.

    Returns what was made.
    """
    with new_directory(destination, overwrite) as folder:
        file = GgufFile(source)
        vocabulary = vocabulary_of(file)
        config = config_of(file, vocabulary)
        nbytes = array_bytes(weights(config, PUBLISHED))
        with progress("converting", nbytes, "bytes") as bar:
            fill_checkpoint(folder, config, params_of(file, config), vocabulary.files(), bar.advance)
    made = {"layers": config.num_layers, "experts": config.num_experts, "chosen": config.experts_per_token}
    return {"storage": PUBLISHED.name, **made, "array_bytes": nbytes}


@dataclasses.dataclass(frozen=True)
class Unread:
    """A weight that is read when NumPy asks for its numbers."""

    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def params_of(file: GgufFile, config: ModelConfig) -> Params:
    """The parameter tree; its leaves are unread, but for routers."""
    head = "output" if "output.weight" in file.tensors else "token_embd"
    names = {"embed": "token_embd", "head": head, "norm": "output_norm"}
    leaves = {name: Unread(partial(file.read, f"{tensor}.weight")) for name, tensor in names.items()}
    layers = {f"layers_{index}": _Layer(file, config, f"blk.{index}").params for index in range(config.num_layers)}
    return {**leaves, "norm": {"weight": leaves["norm"]}, **layers}


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The layer that the file knows by this name."""

    file: GgufFile
    config: ModelConfig
    name: str

    @property
    def params(self) -> Params:
        experts = self.config.num_experts
        return {
            "input_norm": {"weight": self._leaf("attn_norm")},
            "attention": {"qkv": Unread(self._qkv), "o": self._leaf("attn_output")},
            "post_norm": {"weight": self._leaf("ffn_norm")},
            "moe": {
                "router": np.zeros((experts, self.config.hidden_size), np.float32),
                "router_bias": np.zeros(experts, np.float32),
                "gate": Unread(partial(self._rows, "ffn_gate")),
                "up": Unread(partial(self._rows, "ffn_up")),
                "down": Unread(self._columns),
            },
        }

    def _leaf(self, name: str) -> Unread:
        return Unread(partial(self._read, name))

    def _read(self, name: str) -> np.ndarray:
        return self.file.read(f"{self.name}.{name}.weight")

    def _rows(self, name: str) -> np.ndarray:
        return self._read(name).reshape(self.config.num_experts, -1, self.config.hidden_size)

    def _columns(self) -> np.ndarray:
        experts = self.config.num_experts
        matrix = self._read("ffn_down").reshape(self.config.hidden_size, experts, -1)
        with np.errstate(over="ignore"):  # infinity is refused by name when it is stored
            return np.swapaxes(matrix, 0, 1) * np.float32(experts)

    def _qkv(self) -> np.ndarray:
        """A chunk [Q heads, K heads, V heads] for each key/value head."""
        kv_heads, width = self.config.num_kv_heads, self.config.hidden_size
        query, key, value = (self._read(f"attn_{letter}") for letter in "qkv")
        parts = halves_apart(query, self.config.num_heads), halves_apart(key, kv_heads), value
        return np.concatenate([part.reshape(kv_heads, -1, width) for part in parts], axis=1)


def halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * Q, D] whose rotated pairs lie side by side, as llama.cpp wants them, as halves of each head."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)
