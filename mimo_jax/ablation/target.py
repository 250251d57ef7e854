"""What a checkpoint loses where its router is less exact, or where other numbers of experts are chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.ablation.experiments import Metrics, checkpoint_of
from mimo_jax.ablation.heldout import bits_of
from mimo_jax.checkpoint.huggingface import read_hf_config
from mimo_jax.errors import UserError
from mimo_jax.loading import load
from mimo_jax.weights import Params


def check(settings: dict[str, Any]) -> None:
    experts = read_hf_config(checkpoint_of(settings))[0].num_experts
    if settings["experts_per_token"] > experts:
        raise UserError(
            f"study: experts_per_token={settings['experts_per_token']}, but the model has {experts} experts"
        )


def run(settings: dict[str, Any], seed: int, folder: Path) -> Metrics:
    checkpoint = checkpoint_of(settings)
    model = load(checkpoint, layout="dense", draft="none")
    config = dataclasses.replace(model.config, experts_per_token=settings["experts_per_token"])
    params = with_router_in(model.params, jnp.dtype(settings["router"]))
    found = bits_of(params, config, Path(settings["data"]), settings["windows"], seed, checkpoint)
    return {"bits_per_byte": found.bits_per_byte}


def with_router_in(params: Params, dtype: jnp.dtype) -> Params:
    """Parameters whose routers have been stored in `dtype`, a scale for each expert where it has a small range; what
    routes them is float32 still.
    """

    def stored(path: Any, leaf: Any) -> Any:
        if path[-1].key != "router":
            return leaf
        largest = jnp.finfo(dtype).max.astype(jnp.float32) if dtype.itemsize == 1 else None
        scale = 1.0 if largest is None else jnp.max(jnp.abs(leaf), axis=-1, keepdims=True) / largest
        return (leaf / scale).astype(dtype).astype(jnp.float32) * scale

    return jax.tree_util.tree_map_with_path(stored, params)
