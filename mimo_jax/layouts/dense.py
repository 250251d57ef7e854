"""Plain float32 arrays, whatever the files store: what training goes on from and independent implementations read."""

from __future__ import annotations

from mimo_jax.config.model import ModelConfig
from mimo_jax.weights import Params, expand


def pack(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Parameters of any file format. Modules multiply by plain arrays themselves."""
    return config, expand(params)
