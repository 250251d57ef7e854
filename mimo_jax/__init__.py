"""MiMo UltraSpeed in JAX.

import mimo_jax as mimo
model = mimo.load()                                   # the bundled checkpoint; or a path
result = mimo.generate(model, "def fib(n):", mimo.Sampled(temperature=0.7), max_tokens=64)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimo_jax.config import ModelConfig, preset
    from mimo_jax.errors import UserError
    from mimo_jax.generation import Piece, Result, Timing, generate, generate_batch, stream
    from mimo_jax.model import BUNDLED, Model, load
    from mimo_jax.modeling.backbone import Backbone
    from mimo_jax.sampling import Greedy, Sampled

__all__ = [
    "BUNDLED",
    "Backbone",
    "Greedy",
    "Model",
    "ModelConfig",
    "Piece",
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
    "BUNDLED": "model",
    "Backbone": "modeling.backbone",
    "Greedy": "sampling",
    "Model": "model",
    "ModelConfig": "config",
    "Piece": "generation",
    "Result": "generation",
    "Sampled": "sampling",
    "Timing": "generation",
    "UserError": "errors",
    "generate": "generation",
    "generate_batch": "generation",
    "load": "model",
    "preset": "config",
    "stream": "generation",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
