"""`load`: a checkpoint directory of either kind becomes a model that is ready to generate."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mimo_jax.checkpoint.tensorfile import load_json, read_bytes
from mimo_jax.config import ModelConfig
from mimo_jax.decoding import Engine, FlaxStep, Weights
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.drafting import PLAIN, BlockDrafter, Proposer
from mimo_jax.errors import UserError
from mimo_jax.modeling.backbone import Params, is_expert, is_matrix
from mimo_jax.quantization import dequantize, turn
from mimo_jax.sharding import check_fits, parameter_sharding, place
from mimo_jax.tiles import tile_params
from mimo_jax.tokenizer import Tokenizer

_MAX_JSON_BYTES = 4_000_000
BUNDLED = Path(__file__).parent / "assets" / "mimo-tiny"


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters with what is needed to use them: `engine` runs `weights`; `stop_ids` end a text."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    defaults: dict[str, Any]  # of generation_config.json: temperature, top_p, ...
    drafter: Proposer = PLAIN
    draft_params: Params = dataclasses.field(default_factory=dict)
    rule: str = "block"  # that verifies sampled drafts, see `verification.RULES`
    mesh: Mesh | None = None  # that `params` lie on; None: one device

    @property
    def engine(self) -> Engine:
        return Engine(FlaxStep(self.config, self.drafter.taps, self.mesh), self.drafter, self.rule)

    @property
    def weights(self) -> Weights:
        return Weights(self.params, self.draft_params)


def load(
    directory: str | Path = BUNDLED,
    unpack: bool | None = None,
    draft: bool = True,
    mesh: Mesh | None = None,
    expert_backend: str | None = None,
) -> Model:
    """Reads a Hugging Face or an Orbax checkpoint directory.

    `unpack` expands packed weights to one plain float32 array each, which is what XLA on CPU decodes fastest from;
    by default that is done on one CPU only. Everywhere else packed weights stay packed. `draft` decides whether the
    drafter in the folder `dflash/`, if there is one, speeds up decoding; it never changes what is generated. On a
    `mesh` (`sharding.make_mesh`) every device gets its own part of the weights. `expert_backend` names what multiplies
    packed experts (`pallas_kernels.expert_matmul.BACKENDS`); by default that is the fastest that the device runs.
    """
    from mimo_jax.checkpoint.dflash import FOLDER, has_drafter
    from mimo_jax.checkpoint.huggingface import read_any, read_hf_config

    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: not found; expected a checkpoint directory")
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    if unpack and mesh is not None:
        raise UserError("load: unpacked weights are for one device; on a mesh they stay packed")
    if mesh is not None:
        check_fits(read_hf_config(directory), mesh)
    config, params = read_any(directory, partial(parameter_sharding, mesh=mesh) if mesh is not None else None)
    if unpack is None:
        unpack = mesh is None and jax.default_backend() == "cpu" and expert_backend is None
    if unpack:
        config, params = unpack_params(config, params)
    elif config.storage == "mxfp4":
        config, params = tile_params(
            dataclasses.replace(config, expert_backend=expert_backend), params, mesh, consume=True
        )
    defaults = _generation_defaults(directory / "generation_config.json")
    stop_ids = defaults.get("eos_token_id", config.eos_token_id)
    stop_ids = stop_ids if isinstance(stop_ids, list) else [] if stop_ids is None else [stop_ids]
    if not all(type(token) is int and 0 <= token < config.vocab_size for token in stop_ids):
        raise UserError(f"{directory}: eos_token_id={stop_ids} must be token ids below {config.vocab_size}")
    model = Model(config, params, tokenizer, tuple(stop_ids), defaults, mesh=mesh)
    return with_drafter(model, directory / FOLDER) if draft and has_drafter(directory) else model


def load_drafter(target: ModelConfig, directory: Path) -> tuple[DrafterConfig, Params]:
    """The drafter of a `dflash/` folder, which must fit the target, in the dtype of the target's activations."""
    from mimo_jax.checkpoint.dflash import read_drafter

    config, params = read_drafter(directory)
    config.check_fits(target)
    is_turned = target.matrix_format == "turned"

    def place(path, leaf):
        leaf = np.asarray(leaf).astype(target.dtype)
        return turn(leaf) if is_turned and is_matrix(path) else jnp.asarray(leaf)

    stored = {"dtype": target.dtype, "param_dtype": target.dtype, "matrix_format": target.matrix_format}
    return dataclasses.replace(config, **stored), jax.tree_util.tree_map_with_path(place, params)


def with_drafter(model: Model, directory: Path, kind: type[BlockDrafter] = BlockDrafter) -> Model:
    """`model` drafting with the drafter of a `dflash/` folder."""
    config, params = load_drafter(model.config, directory)
    if model.mesh is not None:
        params = place(params, model.mesh)
    return dataclasses.replace(model, drafter=kind(config), draft_params=params)


def _generation_defaults(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return load_json(read_bytes(path, _MAX_JSON_BYTES), str(path))


def dense_params(params: Params) -> Params:
    """The same weights as plain float32 arrays, whatever they are stored as; what training can go on from."""
    # In numpy: eager JAX would compile a program for every shape.
    return jax.tree.map(
        lambda leaf: dequantize(jax.tree.map(np.asarray, leaf), np.float32),
        params,
        is_leaf=lambda node: not isinstance(node, dict),
    )


def load_dense(directory: Path, dtype: str = "float32", mesh: Mesh | None = None) -> Model:
    """A checkpoint as training wants it: plain float32 arrays, expert stacks whole, activations of `dtype`."""
    model = load(directory, unpack=False, draft=False, expert_backend="reference")  # which leaves experts as they lie
    config = dataclasses.replace(model.config, storage="dense", dtype=dtype, param_dtype="float32", expert_backend=None)
    params = dense_params(model.params)
    if mesh is not None:
        check_fits(config, mesh)
        params = place(params, mesh)
    return dataclasses.replace(model, config=config, params=params, mesh=mesh)


def unpack_params(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same weights as plain float32 arrays, one per expert, so that no product copies a slice of a stack.

    All matrices are turned, from [output, input] to [input, output] (`quantization/turned.py`).
    """
    if config.storage == "unpacked" or not any(config.moe_pattern):
        return config, params

    def place(path, leaf):
        if is_expert(path):
            return tuple(jnp.asarray(matrix.T) for matrix in leaf)
        return turn(leaf) if is_matrix(path) else jnp.asarray(leaf)

    unpacked = jax.tree_util.tree_map_with_path(place, dense_params(params))
    return dataclasses.replace(config, storage="unpacked", dtype="float32", param_dtype="float32"), unpacked
