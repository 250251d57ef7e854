"""The small parts every layer shares: weights of any format, linear maps, RMSNorm, rotary embedding, dense SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.modeling.fp8_linear import Axes, fp8_linear
from mimo_jax.quantization import TurnedMatrix, Weight, dequantize, quantize_fp8, quantize_mx, turn
from mimo_jax.sharding import PARAMETERS

Params = dict[str, Any]  # a parameter tree

# Under `jit`, so that a shape that all layers share is traced once.
_PACKERS: dict[str, Callable] = {"fp8": jax.jit(quantize_fp8), "mxfp4": jax.jit(quantize_mx), "turned": turn}


def weight_init(fmt: str, shape: tuple[int, ...], scale: float, dtype: str) -> Callable[[Array], Weight]:
    """An initialiser of normal weights stored as `fmt`: "dense" (of `dtype`), "fp8", "mxfp4" or "turned" (float32)."""

    def init(key: Array) -> Weight:
        dense = scale * jax.random.normal(key, shape, jnp.float32)
        return _PACKERS[fmt](dense) if fmt in _PACKERS else dense.astype(dtype)

    return init


def linear(x: Float[Array, "... K"], weight: Weight, out_dtype=None, axes: Axes = ()) -> Float[Array, "... N"]:
    """x W^T for a stored weight [N, K], accumulated in float32; `axes` as for `fp8_linear`."""
    if isinstance(weight, TurnedMatrix):
        y = jnp.einsum("...k,kn->...n", x, weight.matrix.astype(x.dtype), preferred_element_type=jnp.float32)
    elif (y := fp8_linear(x, weight, axes)) is None:
        y = jnp.einsum("...k,nk->...n", x, dequantize(weight, x.dtype), preferred_element_type=jnp.float32)
    return y.astype(out_dtype or x.dtype)


def matrix_init(config: ModelConfig | DrafterConfig, shape: tuple[int, int]) -> Callable[[Array], Weight]:
    """An initialiser of a matrix [N, K] that is never quantised, in the form that the config keeps them in."""
    return weight_init(config.matrix_format, shape, config.init_range, config.param_dtype)


class RMSNorm(nn.Module):
    """Mean square and rsqrt in float32, cast to the activation dtype, then the gain."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gain_D = self.param("weight", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.param_dtype))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * gain_D.astype(x.dtype)


def norm(config: ModelConfig | DrafterConfig) -> RMSNorm:
    """The RMSNorm of a model or drafter."""
    return RMSNorm(config.norm_eps, config.param_dtype)


def rotary_table(
    positions_BT: Int[Array, "B T"], dim: int, theta: float, dtype
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """cos and sin of position x theta^(-2i/dim), i < dim/2; angles in float32, then cast as published code does."""
    frequencies_R = (theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)
    angles_BTR = positions_BT[..., None].astype(jnp.float32) * frequencies_R
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
    fmt: str
    init_range: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        shapes = {"gate": (self.features, x.shape[-1]), "up": (self.features, x.shape[-1])}
        shapes["down"] = (x.shape[-1], self.features)
        gate, up, down = (
            self.param(name, weight_init(self.fmt, shape, self.init_range, self.param_dtype))
            for name, shape in shapes.items()
        )
        hidden = nn.silu(linear(x, gate, axes=PARAMETERS["gate"])) * linear(x, up, axes=PARAMETERS["up"])
        return linear(hidden, down, axes=PARAMETERS["down"])
