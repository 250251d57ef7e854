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
    from mimo_jax.media.parts import Audio, Image, Video
    from mimo_jax.modeling.backbone import Backbone
    from mimo_jax.paths import Best, Candidate, best_of, tree_search
    from mimo_jax.serving.engine import Engine, Limits

__all__ = [
    "BUNDLED",
    "Audio",
    "Backbone",
    "Best",
    "Candidate",
    "Engine",
    "Greedy",
    "Image",
    "Limits",
    "Model",
    "ModelConfig",
    "Piece",
    "Request",
    "Result",
    "Sampled",
    "Timing",
    "UserError",
    "Video",
    "best_of",
    "generate",
    "generate_batch",
    "load",
    "preset",
    "stream",
    "tree_search",
]

# Where each public name lives: importing the package must not import JAX.
_HOMES = {
    "Audio": "media.parts",
    "BUNDLED": "loading",
    "Backbone": "modeling.backbone",
    "Best": "paths",
    "Candidate": "paths",
    "Engine": "serving.engine",
    "Greedy": "decode.sampling",
    "Image": "media.parts",
    "Limits": "serving.engine",
    "Model": "loading",
    "ModelConfig": "config.model",
    "Piece": "generation",
    "Request": "generation",
    "Result": "generation",
    "Sampled": "decode.sampling",
    "Timing": "generation",
    "UserError": "errors",
    "Video": "media.parts",
    "best_of": "paths",
    "generate": "generation",
    "generate_batch": "generation",
    "load": "loading",
    "preset": "config.presets",
    "stream": "generation",
    "tree_search": "paths",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
