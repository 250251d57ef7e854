"""A step: (params, tokens, cache, counts, logits) -> (logits, features, cache). The loop knows no more of a model."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mimo_jax.config.model import MAX_BLOCK, ModelConfig
from mimo_jax.modeling.backbone import Backbone, Features
from mimo_jax.modeling.cache import Cache
from mimo_jax.sharding import replicate, using
from mimo_jax.weights import Params


@dataclasses.dataclass(frozen=True)
class FlaxStep:
    """The modules under XLA as a step. Hashable, so that equal configs share compiled programs."""

    config: ModelConfig
    aux_layers: tuple[int, ...] = ()
    mesh: Mesh | None = None

    def __call__(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        cache: Cache,
        counts_B: Int[Array, "B"],
        logits: Literal["all", "last"] = "all",
    ) -> tuple[Float[Array, "B _ C"], Features, Cache]:
        """Reads the first `counts_B` tokens of each row after the cache's; logits of all T, or of the last one read."""
        if self.mesh is None:
            return self._read(params, tokens_BT, cache, counts_B, logits)
        steps = tokens_BT.shape[1]
        # No product has fewer rows than a block: sums are added up in one order, and a token gets the same logits
        # alone as in a block.
        padded_BT = jnp.pad(tokens_BT, ((0, 0), (0, max(MAX_BLOCK - steps, 0))))
        with using(self.mesh):
            logits_BTC, features, cache = self._read(params, padded_BT, cache, counts_B, logits)
            # Whole on every device: else what reads the features decides how the residual stream is split.
            whole = {name: replicate(getattr(features, name)[:, :steps]) for name in ("hidden", "aux")}
            return logits_BTC[:, :steps], dataclasses.replace(features, **whole), cache

    def _read(self, params, tokens_BT, cache, counts_B, logits) -> tuple[Array, Features, Cache]:
        backbone = Backbone(self.config, self.aux_layers)
        return backbone.apply({"params": params}, tokens_BT, cache, counts_B, logits)
