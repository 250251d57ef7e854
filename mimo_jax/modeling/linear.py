"""Weights as modules see them: plain arrays, or what a layout made of them.

Modules declare plain float32 arrays, which is what `init` makes and training works on. A layout (`mimo_jax.layouts`)
puts containers in their place that know how to multiply; modules call them and know none.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mimo_jax.errors import UserError
from mimo_jax.weights import BlockFp8Tensor, MxTensor


@runtime_checkable
class Matrix(Protocol):
    """A layout's container of weights [*O, I]."""

    def multiply(self, x: Float[Array, "*B I"]) -> Float[Array, "*B *O"]:
        """x W^T, accumulated in float32."""
        ...

    def axes(self) -> Any:
        """The container with the axes of each array in its place, see `sharding.MESH_AXES`."""
        ...


def parameter(module: nn.Module, name: str, shape: tuple[int, ...], init: nn.initializers.Initializer) -> Any:
    """The parameter `name` of a module: a float32 array of `shape` at `init`, later anything a layout put there."""
    held = module.get_variable("params", name)
    if isinstance(held, MxTensor | BlockFp8Tensor):
        raise UserError(f"parameter {name!r} is as files store it; `layouts.for_device` makes parameters ready to run")
    if held is None or hasattr(held, "dtype"):  # Flax creates it, or compares its shape
        return module.param(name, init, shape, jnp.float32)
    return held


def matrix(module: nn.Module, name: str, shape: tuple[int, ...], scale: float) -> Any:
    """A parameter of normal weights [*O, I]."""
    return parameter(module, name, shape, nn.initializers.normal(scale))


def linear(x: Float[Array, "*B I"], weight: Array | Matrix, out_dtype=None) -> Float[Array, "*B *O"]:
    """x W^T for a weight [*O, I], accumulated in float32; in the dtype of `x` unless `out_dtype` is given."""
    y = multiply_plain(x, weight) if isinstance(weight, Array | np.ndarray) else weight.multiply(x)
    return y.astype(out_dtype or x.dtype)


def multiply_plain(x: Float[Array, "*B I"], weight: Float[Array, "*O I"]) -> Float[Array, "*B *O"]:
    """`linear` by a plain array, in float32."""
    # As one flat matrix: contracted with three axes, XLA on CPU transposes the whole weight at every step.
    flat_OI = weight.astype(x.dtype).reshape(-1, weight.shape[-1])
    y = jnp.einsum("...i,oi->...o", x, flat_OI, preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], *weight.shape[:-1])
