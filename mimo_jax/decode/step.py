"""A step: (params, tokens, cache, counts, logits) -> (logits, features, cache). The loop knows no more of a model.

`FlaxStep` is the modules under XLA. `FusedStep` does a whole round in one call of native code, on one CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mimo_jax.config.geometry import target_of
from mimo_jax.config.model import MESH_BLOCK, ModelConfig
from mimo_jax.decode.sampling import Search, least_kept, most_likely
from mimo_jax.errors import UserError
from mimo_jax.layouts.native import NATIVE, reason_against
from mimo_jax.modeling.backbone import MEDIA, Backbone, Features
from mimo_jax.modeling.cache import Cache, init_cache
from mimo_jax.sharding import replicate, using
from mimo_jax.weights import Params
from pallas_kernels import decode_step

Shown = Literal["all", "last"]


class Step(Protocol):
    """What the loop calls. Hashable, so that equal ones share compiled programs."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def mesh(self) -> Mesh | None: ...

    @property
    def prefill_buckets(self) -> tuple[int, ...]:
        """How many tokens of each row a call of a prefill may have; the last is the most."""
        ...

    @property
    def groups_freely(self) -> bool:
        """Whether no bit of a token depends on the tokens that are read in the same call."""
        ...

    @property
    def search(self) -> Search:
        """What finds the thresholds of filters beside this step."""
        ...

    def init_cache(self, batch: int, capacity: int) -> Any:
        """An empty cache of `batch` rows of at most `capacity` tokens; its `lengths` are the committed ones."""
        ...

    def __call__(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        cache: Any,
        counts_B: Int[Array, "B"],
        logits: Shown = "all",
    ) -> tuple[Float[Array, "B _ C"], Features, Any]:
        """Reads the first `counts_B` tokens of each row after the cache's; logits of all T, or of the last one read.

        `features.best` are the first of the largest logits.
        """
        ...


@dataclasses.dataclass(frozen=True)
class FlaxStep:
    """The modules under XLA as a step."""

    config: ModelConfig
    aux_layers: tuple[int, ...] = ()
    mesh: Mesh | None = None
    prefill_buckets: tuple[int, ...] = (16, 64, 256)
    groups_freely: bool = False  # XLA adds sums in an order that may change with their number
    search: Search = least_kept

    def init_cache(self, batch: int, capacity: int) -> Cache:
        return init_cache(self.config, batch, capacity)

    def __call__(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        cache: Cache,
        counts_B: Int[Array, "B"],
        logits: Shown = "all",
    ) -> tuple[Float[Array, "B _ C"], Features, Cache]:
        """See `Step`."""
        read = self._read if self.mesh is None else self._read_on_mesh
        found, features, cache = read(params, tokens_BT, cache, counts_B, logits)
        return found, dataclasses.replace(features, best=most_likely(found)), cache

    def _read_on_mesh(self, params, tokens_BT, cache, counts_B, logits) -> tuple[Array, Features, Cache]:
        steps = tokens_BT.shape[1]
        # No product has fewer rows than a block: sums are added up in one order, and a token gets the same logits
        # alone as in a block.
        padded_BT = jnp.pad(tokens_BT, ((0, 0), (0, max(MESH_BLOCK - steps, 0))))
        with using(self.mesh):
            logits_BTC, features, cache = self._read(params, padded_BT, cache, counts_B, logits)
            # Whole on every device: else what reads the features decides how the residual stream is split.
            whole = {name: replicate(getattr(features, name)[:, :steps]) for name in ("hidden", "aux")}
            return logits_BTC[:, :steps], dataclasses.replace(features, **whole), cache

    def _read(self, params, tokens_BT, cache, counts_B, logits) -> tuple[Array, Features, Cache]:
        backbone = Backbone(self.config, self.aux_layers)
        return backbone.apply({"params": params}, tokens_BT, cache, counts_B, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedCache:
    """The cache of all layers of a kind in one array each, and the number of committed tokens of each row."""

    layers: decode_step.TargetCache
    lengths: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """So many tokens a row may have."""
        return max(self.layers.global_values.shape[3], self.layers.sliding_values.shape[3])


@dataclasses.dataclass(frozen=True)
class FusedStep:
    """A whole round in one call. It takes parameters of the layout "native"; `running` is for tests."""

    config: ModelConfig
    aux_layers: tuple[int, ...] = ()
    running: decode_step.Running = decode_step.NORMALLY
    mesh: None = None
    prefill_buckets: tuple[int, ...] = (decode_step.CHUNK,)
    groups_freely: bool = True
    search: Search = decode_step.least_kept

    def __post_init__(self) -> None:
        if reason := reason_against(self.config):
            raise UserError(f"the native step cannot serve this model: {reason}")

    def init_cache(self, batch: int, capacity: int) -> StackedCache:
        return StackedCache(
            decode_step.init_cache(target_of(self.config), batch, capacity), jnp.zeros(batch, jnp.int32)
        )

    def __call__(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        cache: StackedCache,
        counts_B: Int[Array, "B"],
        logits: Shown = "all",
    ) -> tuple[Float[Array, "B _ C"], Features, StackedCache]:
        """See `Step`."""
        found = decode_step.step(
            target_of(self.config),
            self.aux_layers,
            params[NATIVE],
            tokens_BT,
            cache.layers,
            cache.lengths,
            counts_B,
            logits == "last",
            self.running,
            params.get(MEDIA),
        )
        features = Features(found.hidden, found.expert_counts, found.aux, found.best)
        return found.logits, features, StackedCache(found.cache, cache.lengths + counts_B)
