"""MiMo UltraSpeed in JAX.

import mimo_jax as mimo
model = mimo.load()                                   # the bundled checkpoint; or a path
result = mimo.generate(model, "def fib(n):", mimo.Sampled(temperature=0.7), max_tokens=64)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimo_jax.config.model import ModelConfig
    from mimo_jax.config.presets import preset
    from mimo_jax.decode.sampling import Greedy, Sampled
    from mimo_jax.errors import UserError
    from mimo_jax.generation import Piece, Request, Result, Timing, generate, generate_batch, stream
    from mimo_jax.loading import BUNDLED, Model, load
    from mimo_jax.modeling.backbone import Backbone

__all__ = [
    "BUNDLED",
    "Backbone",
    "Greedy",
    "Model",
    "ModelConfig",
    "Piece",
    "Request",
    "Result",
    "Sampled",
    "Timing",
    "UserError",
    "generate",
    "generate_batch",
    "load",
    "preset",
    "stream",
]

# Where each public name lives: importing the package must not import JAX.
_HOMES = {
    "BUNDLED": "loading",
    "Backbone": "modeling.backbone",
    "Greedy": "decode.sampling",
    "Model": "loading",
    "ModelConfig": "config.model",
    "Piece": "generation",
    "Request": "generation",
    "Result": "generation",
    "Sampled": "decode.sampling",
    "Timing": "generation",
    "UserError": "errors",
    "generate": "generation",
    "generate_batch": "generation",
    "load": "loading",
    "preset": "config.presets",
    "stream": "generation",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
