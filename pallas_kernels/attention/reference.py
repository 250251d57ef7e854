"""The op in plain JAX, a chunk of the cache at a time: what CPUs run, and what kernels must equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.backends import Shaped

MASKED = -1e30  # finite: a row of padding may have nothing visible at all
CHUNK = 8192  # keys that are attended to at a time: the scores of more would not stay in a GPU's caches


def unsupported(q_BTHQ: Shaped, k_BKSQ: Shaped, v_BKSV: Shaped) -> None:
    """Nothing is."""


def attend_long(
    q_BTHQ: Float[Array, "B T H Q"],
    k_BKSQ: Float[Array, "B K S Q"],
    v_BKSV: Float[Array, "B K S V"],
    query_BT: Int[Array, "B T"],
    sink_H: Float[Array, "H"] | None,
) -> Float[Array, "B T H V"]:
    """`api.attend_long`: the softmax is kept as a running maximum, sum and weighted values (arXiv 1805.02867)."""
    batch, steps, heads = q_BTHQ.shape[:3]
    kv_heads, rows = k_BKSQ.shape[1:3]
    chunk = min(CHUNK, rows)

    def visit(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        before, total, out = carry
        start = jnp.minimum(index * chunk, rows - chunk)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=2) for x in (k_BKSQ, v_BKSV))
        key_S = start + jnp.arange(chunk)
        is_new_S = key_S >= index * chunk  # the last chunk may start among the keys before it
        s_BKGTS = scores(q_BTHQ, keys, is_new_S & (key_S <= query_BT[..., None]))
        top = jnp.maximum(before, jnp.max(s_BKGTS, axis=-1, keepdims=True))
        e_BKGTS, kept = jnp.exp(s_BKGTS - top), jnp.exp(before - top)
        seen = jnp.einsum("bkgts,bksv->bkgtv", e_BKGTS.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return top, total * kept + jnp.sum(e_BKGTS, axis=-1, keepdims=True), out * kept + seen

    shape = (batch, kv_heads, heads // kv_heads, steps)
    top, total = jnp.full((*shape, 1), MASKED), jnp.zeros((*shape, 1))
    if sink_H is not None:
        sink_KG = sink_H.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, 1, 1)
        top, total = jnp.maximum(top, sink_KG), total + 1.0
    out = jnp.zeros((*shape, v_BKSV.shape[-1]))
    count = jnp.minimum(jnp.max(query_BT) // chunk + 1, -(-rows // chunk))
    _, total, out = jax.lax.fori_loop(0, count, visit, (top, total, out))
    out_BTKGV = jnp.moveaxis(out / total, 3, 1).astype(v_BKSV.dtype)
    return out_BTKGV.reshape(batch, steps, heads, -1)


def scores(
    q_BTHQ: Float[Array, "B T H Q"], k_BKSQ: Float[Array, "B K S Q"], visible_BTS: Bool[Array, "B T S"]
) -> Float[Array, "B K G T S"]:
    """Scaled products in float32, `MASKED` where a key is not visible."""
    batch, steps, _, width = q_BTHQ.shape
    q_BTKGQ = q_BTHQ.reshape(batch, steps, k_BKSQ.shape[1], -1, width)
    s_BKGTS = jnp.einsum("btkgq,bksq->bkgts", q_BTKGQ, k_BKSQ, preferred_element_type=jnp.float32) * width**-0.5
    return jnp.where(visible_BTS[:, None, None], s_BKGTS, MASKED)
