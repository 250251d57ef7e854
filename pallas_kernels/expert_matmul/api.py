"""The op: tokens, expert ids and combine weights in; the gated FFN of the chosen experts, combined in float32, out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import Backends
from pallas_kernels.expert_matmul.hopper_layout import HopperExperts, PackedExperts

Experts = PackedExperts | HopperExperts
KERNELS = Backends("pallas_kernels.expert_matmul", ("mosaic_gpu", "triton", "reference"))
BACKENDS = KERNELS.names


def expert_ffn(
    x_TD: Float[Array, "T D"],
    ids_TX: Int[Array, "T X"],
    weights_TX: Float[Array, "T X"],
    experts: Experts,
    *,
    layer: int = 0,
    num_experts: int | None = None,
    backend: str | None = None,
) -> Float[Array, "T D"]:
    """sum_x weights[t, x] * expert[ids[t, x]](x[t]) in float32; every token of every expert, at any imbalance.

    `experts` holds the stacks of one layer, or of several one after the other: then `num_experts` is what a layer has,
    and `layer` selects. A stack may be a slice of the features (the results of all slices add up), or of the experts:
    an id that is `num_experts` names none of them. Any other id outside of 0..num_experts is a mistake, which
    `checkify` reports; without it, the id names none either, and nothing is read.

    `backend` is one of `BACKENDS`; by default the fastest that serves the call on this device. A named one that does
    not serve it raises NotImplementedError, and never gives way to another.
    """
    num_experts = experts.sizes[0] if num_experts is None else num_experts
    _check(x_TD, ids_TX, weights_TX, experts, layer, num_experts)
    is_expert_TX = (ids_TX >= 0) & (ids_TX < num_experts)
    checkify.debug_check(
        jnp.all(is_expert_TX | (ids_TX == num_experts)),
        "expert ids from {least} to {most}; there are {number} experts",
        least=jnp.min(ids_TX),
        most=jnp.max(ids_TX),
        number=jnp.int32(num_experts),
    )
    module = KERNELS.serving(backend, x_TD, ids_TX, experts)
    ids_TX = jnp.where(is_expert_TX, ids_TX, num_experts)
    return module.expert_ffn(x_TD, ids_TX, weights_TX, experts, layer * num_experts, num_experts)


def _check(x_TD: Array, ids_TX: Array, weights_TX: Array, experts: Experts, layer: int, num_experts: int) -> None:
    """Raises ValueError, naming the value, where the arguments do not fit each other."""
    stack, hidden, _ = experts.sizes
    if x_TD.ndim != 2 or x_TD.shape[1] != hidden:
        raise ValueError(f"tokens of shape {x_TD.shape}; the experts read rows of {hidden}")
    if not jnp.issubdtype(x_TD.dtype, jnp.floating):
        raise ValueError(f"tokens of dtype {x_TD.dtype}; a floating one is needed")
    if ids_TX.shape != weights_TX.shape or ids_TX.shape[:1] != x_TD.shape[:1] or ids_TX.ndim != 2:
        raise ValueError(f"ids {ids_TX.shape} and combine weights {weights_TX.shape} for tokens {x_TD.shape}")
    if not jnp.issubdtype(ids_TX.dtype, jnp.integer):
        raise ValueError(f"ids of dtype {ids_TX.dtype}; integers are needed")
    if num_experts < 1 or stack % num_experts or not 0 <= layer < stack // num_experts:
        raise ValueError(f"layer {layer} of {num_experts} experts in stacks of {stack}")
    wanted = jnp.int32 if isinstance(experts, HopperExperts) else jnp.uint8
    for leaf in jax.tree.leaves(experts):
        if leaf.dtype != wanted:
            raise ValueError(f"experts of dtype {leaf.dtype}; these stay packed, as {jnp.dtype(wanted)}")
