"""Plain float32 arrays, whatever the files store: what training goes on from and independent implementations read, and
what a CPU without native code decodes from.
"""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from mimo_jax.config.model import ModelConfig
from mimo_jax.sharding import place
from mimo_jax.weights import Params, expand


def pack(config: ModelConfig, params: Params, mesh: Mesh | None = None) -> tuple[ModelConfig, Params]:
    """Parameters of any file format; activations are float32, too. Modules multiply by plain arrays themselves."""
    return dataclasses.replace(config, dtype="float32"), place(expand(params), mesh)
