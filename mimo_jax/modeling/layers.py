"""The small parts every layer shares: RMSNorm, rotary embedding, dense SwiGLU."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.modeling.linear import linear, matrix, parameter


class RMSNorm(nn.Module):
    """Mean square and rsqrt in float32, cast to the activation dtype, then the gain."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        gain_D = parameter(self, "weight", (x.shape[-1],), nn.initializers.ones)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * gain_D.astype(x.dtype)


def rotary_frequencies(dim: int, theta: float) -> Float[np.ndarray, "R"]:
    """theta^(-2i/dim), i < dim/2."""
    return (theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)


def rotary_table(
    positions_BT: Int[Array, "B T"], dim: int, theta: float, dtype
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """cos and sin of position x theta^(-2i/dim), i < dim/2; angles in float32, then cast as published code does."""
    angles_BTR = positions_BT[..., None].astype(jnp.float32) * rotary_frequencies(dim, theta)
    return jnp.cos(angles_BTR).astype(dtype), jnp.sin(angles_BTR).astype(dtype)


def rotate(x_BTHQ: Float[Array, "B T H Q"], cos_BTR: Array, sin_BTR: Array) -> Float[Array, "B T H Q"]:
    """NeoX half-split rotation of the first 2R of Q dimensions; the rest pass through."""
    half = cos_BTR.shape[-1]
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    first, second, rest = jnp.split(x_BTHQ, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class DenseMlp(nn.Module):
    """SwiGLU without clamp: (silu(x G^T) * x U^T) D^T."""

    features: int
    init_range: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        width = x.shape[-1]
        gate = matrix(self, "gate", (self.features, width), self.init_range)
        up = matrix(self, "up", (self.features, width), self.init_range)
        down = matrix(self, "down", (width, self.features), self.init_range)
        return linear(nn.silu(linear(x, gate)) * linear(x, up), down)
