"""The routed SwiGLU experts: whatever holds them, on one device or distributed over a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.sharding import EXPERT, REPLICA, current_mesh, spec_of
from pallas_kernels.expert_matmul import ffn_of

EXPERT_AXES = {
    "gate": ("experts", "expert_features", None),
    "up": ("experts", "expert_features", None),
    "down": ("experts", None, "expert_features"),
}


@runtime_checkable
class Experts(Protocol):
    """All experts of a layer, or those (or those features of them) that one device holds."""

    @property
    def count(self) -> int: ...

    def ffn(
        self, x_TD: Float[Array, "T D"], ids_TX: Int[Array, "T X"], weights_TX: Float[Array, "T X"]
    ) -> Float[Array, "T D"]:
        """sum_x weights[t, x] * expert[ids[t, x]](x[t]) in float32; an id past the last expert names none."""
        ...

    def axes(self) -> Any:
        """The container with the axes of each array in its place, see `sharding.MESH_AXES`."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseExperts:
    """Plain stacks: gate and up [E, F, D], down [E, D, F]."""

    gate: Any
    up: Any
    down: Any

    @property
    def count(self) -> int:
        return self.gate.shape[0]

    def ffn(self, x_TD: Array, ids_TX: Array, weights_TX: Array) -> Array:
        def read(expert: Array) -> tuple[Array, ...]:
            return tuple(jnp.asarray(stack)[expert].astype(x_TD.dtype) for stack in (self.gate, self.up, self.down))

        return ffn_of(read, self.count, x_TD, ids_TX, weights_TX)

    def axes(self) -> DenseExperts:
        return DenseExperts(**EXPERT_AXES)


def routed_ffn(
    x_TD: Float[Array, "T D"], ids_TX: Int[Array, "T X"], weights_TX: Float[Array, "T X"], experts: Experts
) -> Float[Array, "T D"]:
    """sum_x weights[t, x] * expert[ids[t, x]](x[t]), combined in float32. No token is dropped at any imbalance."""
    if current_mesh() is None:
        return experts.ffn(x_TD, ids_TX, weights_TX).astype(x_TD.dtype)

    def partial_ffn(x_TD: Array, ids_TX: Array, weights_TX: Array, experts: Experts) -> Array:
        """The whole sum, on devices that each hold some experts, or some features of them."""
        held = experts.count
        mine_TX = ids_TX - jax.lax.axis_index(EXPERT) * held
        is_mine_TX = (mine_TX >= 0) & (mine_TX < held)
        mine_TX, weights_TX = jnp.where(is_mine_TX, mine_TX, held), jnp.where(is_mine_TX, weights_TX, 0.0)
        return jax.lax.psum(experts.ffn(x_TD, mine_TX, weights_TX), REPLICA)

    # By hand: left to itself, the compiler reduces over the devices once per expert.
    tokens = spec_of(("batch", None))
    specs = jax.tree.map(lambda _, axes: spec_of(axes), experts, experts.axes())
    per_device = jax.shard_map(partial_ffn, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens, check_vma=False)
    return per_device(x_TD, ids_TX, weights_TX, experts).astype(x_TD.dtype)
