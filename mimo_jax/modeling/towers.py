"""What the towers of images and of audio share: layers with biases, and attention in chunks of queries."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.modeling.layers import rotate
from mimo_jax.modeling.linear import linear, matrix, parameter

QUERIES = 128  # that are looked at together: the scores of all would not fit


class Affine(nn.Module):
    """x W^T + b, or without b."""

    outputs: int
    init_range: float
    has_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = linear(x, matrix(self, "weight", (self.outputs, x.shape[-1]), self.init_range))
        if self.has_bias:
            y += parameter(self, "bias", (self.outputs,), nn.initializers.zeros).astype(y.dtype)
        return y


class LayerNorm(nn.Module):
    """Mean and variance in float32, then the gain, and perhaps an offset."""

    eps: float
    has_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        normed *= parameter(self, "weight", x.shape[-1:], nn.initializers.ones)
        if self.has_bias:
            normed += parameter(self, "bias", x.shape[-1:], nn.initializers.zeros)
        return normed.astype(x.dtype)


def gelu(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """x Phi(x), in float32: in bfloat16 a feature loses 9 %."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


class GatedMlp(nn.Module):
    """SwiGLU, with biases or without."""

    features: int
    init_range: float
    has_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        def affine(outputs: int, name: str) -> Affine:
            return Affine(outputs, self.init_range, self.has_bias, name=name)

        gate, up = (affine(self.features, name)(x) for name in ("gate_proj", "up_proj"))
        return affine(x.shape[-1], "down_proj")(nn.silu(gate) * up)


def rotated(x_FSHQ: Float[Array, "F S H Q"], rotary: tuple[Array, Array]) -> Float[Array, "F S H Q"]:
    """Turned by its place, in float32."""
    return rotate(x_FSHQ.astype(jnp.float32), *rotary).astype(x_FSHQ.dtype)


def look(
    q_FSHQ: Float[Array, "F S H Q"],
    k_FSKQ: Float[Array, "F S K Q"],
    v_FSKQ: Float[Array, "F S K Q"],
    count: Int[Array, ""],
    reach: tuple[int, int] | None = None,
    sink_H: Float[Array, "H"] | None = None,
    sink: str = "denominator",
) -> Float[Array, "F S H Q"]:
    """What every place sees of the first `count` of its own sequence: all, or `reach` places before and after itself.

    Softmax is in float32. A sink is one more term of its denominator, or it is added to the score of the "first key".
    """
    size = q_FSHQ.shape[1]
    chunk = min(size, QUERIES)
    before, after = (size, size) if reach is None else reach
    width = min(size, chunk + before + after)  # keys that a chunk may see

    def of_chunk(first: Array) -> Array:
        query_C = first + jnp.arange(chunk)
        start = jnp.clip(first - before, 0, size - width)
        key_W = start + jnp.arange(width)
        q = jax.lax.dynamic_slice_in_dim(q_FSHQ, first, chunk, axis=1)
        k, v = (jax.lax.dynamic_slice_in_dim(part, start, width, axis=1) for part in (k_FSKQ, v_FSKQ))
        ahead_CW = key_W - query_C[:, None]
        visible_CW = (ahead_CW >= -before) & (ahead_CW <= after) & (key_W < count)
        return _attend(q, k, v, visible_CW, sink_H, sink, key_W == 0)

    firsts = jnp.minimum(jnp.arange(0, size, chunk), size - chunk)
    chunks_NFCHQ = jax.lax.map(of_chunk, firsts)
    place_S = jnp.arange(size)
    return chunks_NFCHQ[place_S // chunk, :, place_S - firsts[place_S // chunk]].swapaxes(0, 1)


def _attend(
    q_FCHQ: Array,
    k_FWKQ: Array,
    v_FWKQ: Array,
    visible_CW: Array,
    sink_H: Array | None,
    sink: str,
    is_first_W: Array,
) -> Float[Array, "F C H Q"]:
    groups = k_FWKQ.shape[2]
    grouped = q_FCHQ.reshape(*q_FCHQ.shape[:2], groups, -1, q_FCHQ.shape[-1])
    scores_FKGCW = jnp.einsum("fckgq,fwkq->fkgcw", grouped, k_FWKQ, preferred_element_type=jnp.float32)
    scores_FKGCW *= q_FCHQ.shape[-1] ** -0.5
    sink_KG11 = None if sink_H is None else sink_H.astype(jnp.float32).reshape(groups, -1, 1, 1)
    if sink_KG11 is not None and sink == "first key":
        scores_FKGCW += sink_KG11 * is_first_W
    scores_FKGCW = jnp.where(visible_CW, scores_FKGCW, -jnp.inf)
    # Rows of padding may see nothing at all.
    most = jnp.maximum(jnp.max(scores_FKGCW, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    if sink_KG11 is not None and sink == "denominator":
        most = jnp.maximum(most, sink_KG11)
    weights_FKGCW = jnp.exp(scores_FKGCW - most)
    total = jnp.sum(weights_FKGCW, axis=-1, keepdims=True)
    if sink_KG11 is not None and sink == "denominator":
        total += jnp.exp(sink_KG11 - most)
    weights_FKGCW = (weights_FKGCW / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(v_FWKQ.dtype)
    out = jnp.einsum("fkgcw,fwkq->fckgq", weights_FKGCW, v_FWKQ, preferred_element_type=jnp.float32)
    return out.reshape(q_FCHQ.shape).astype(q_FCHQ.dtype)
