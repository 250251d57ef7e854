"""The op: queries, the rows of a cache and the queries' positions in; softmax attention, in float32, out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import Backends

KERNELS = Backends("pallas_kernels.attention", ("triton", "reference"))
BACKENDS = KERNELS.names


def attend_long(
    q_BTHQ: Float[Array, "B T H Q"],
    k_BKSQ: Float[Array, "B K S Q"],
    v_BKSV: Float[Array, "B K S V"],
    query_BT: Int[Array, "B T"],
    sink_H: Float[Array, "H"] | None,
    *,
    backend: str | None = None,
) -> Float[Array, "B T H V"]:
    """Each query over the keys up to its own position, which are the rows up to there; the rest is not read.

    Positions are 0 at least, and S or more where a query sees every row. Query heads share key heads in groups: head
    h reads key head h // (H / K). The sink is one more logit of each head, without a value. Has no gradient.

    `backend` is one of `BACKENDS`; by default the fastest that serves the call on this device. A named one that does
    not serve it raises NotImplementedError, and never gives way to another.
    """
    _check(q_BTHQ, k_BKSQ, v_BKSV, query_BT, sink_H)
    module = KERNELS.serving(backend, q_BTHQ, k_BKSQ, v_BKSV)
    return module.attend_long(q_BTHQ, k_BKSQ, v_BKSV, query_BT, sink_H)


def _check(q_BTHQ: Array, k_BKSQ: Array, v_BKSV: Array, query_BT: Array, sink_H: Array | None) -> None:
    """Raises ValueError, naming the value, where the arguments do not fit each other."""
    shapes = f"queries {q_BTHQ.shape}, keys {k_BKSQ.shape}, values {v_BKSV.shape}"
    if not q_BTHQ.ndim == k_BKSQ.ndim == v_BKSV.ndim == 4:
        raise ValueError(f"{shapes}; each has four axes")
    batch, tokens, heads, width = q_BTHQ.shape
    kv_heads = k_BKSQ.shape[1]
    if k_BKSQ.shape[:3] != v_BKSV.shape[:3] or (k_BKSQ.shape[0], k_BKSQ.shape[3]) != (batch, width):
        raise ValueError(f"{shapes} do not fit each other")
    if 0 in (*q_BTHQ.shape, *k_BKSQ.shape, *v_BKSV.shape):
        raise ValueError(f"{shapes}; none may be empty")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} key heads; a multiple is needed")
    for name, array in (("queries", q_BTHQ), ("keys", k_BKSQ), ("values", v_BKSV)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} of dtype {array.dtype}; a floating one is needed")
    if query_BT.shape != (batch, tokens) or not jnp.issubdtype(query_BT.dtype, jnp.integer):
        raise ValueError(f"positions {query_BT.shape} of dtype {query_BT.dtype} for queries {q_BTHQ.shape}")
    if sink_H is not None and sink_H.shape != (heads,):
        raise ValueError(f"sinks {sink_H.shape} for {heads} query heads")
