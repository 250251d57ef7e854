"""Plain float32 weights as XLA on one CPU decodes fastest from: matrices transposed, every expert an array of its own.

All of this is here to make XLA on CPU faster and may go when a native step replaces it there (docs/LOG.md has the
figures: a block of 8 rows takes two thirds of the time, no product copies a slice of a stack).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mimo_jax.config.model import ModelConfig
from mimo_jax.weights import Params, expand
from mimo_jax.weights.params import STACKS, is_matrix, is_moe, with_experts
from pallas_kernels.expert_matmul import DECODE_TOKENS, TRANSPOSED, coefficients, ffn_of, swiglu


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedMatrix:
    """A matrix [*O, I] that is kept as [I, all of O]."""

    matrix: Array
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # O, before it became one axis

    @classmethod
    def of(cls, weights_OI: Float[Array | np.ndarray, "*O I"]) -> TransposedMatrix:
        flat_OI = weights_OI.reshape(-1, weights_OI.shape[-1])
        return cls(jnp.asarray(flat_OI.T), weights_OI.shape[:-1])

    def multiply(self, x: Float[Array, "*B I"]) -> Float[Array, "*B *O"]:
        """x W^T in float32."""
        y = jnp.einsum("...i,io->...o", x, self.matrix.astype(x.dtype), preferred_element_type=jnp.float32)
        return y.reshape(*x.shape[:-1], *self.rows)

    def axes(self) -> TransposedMatrix:
        """There is one device."""
        return jax.tree.map(lambda _: (), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeparateExperts:
    """Per expert its own transposed matrices: gate and up [D, F], down [F, D]."""

    gate: tuple[Any, ...]
    up: tuple[Any, ...]
    down: tuple[Any, ...]

    @property
    def count(self) -> int:
        return len(self.gate)

    def ffn(self, x_TD: Array, ids_TX: Array, weights_TX: Array) -> Array:
        stacks = (self.gate, self.up, self.down)
        if x_TD.shape[0] <= DECODE_TOKENS:
            return _branch_by_branch(x_TD, ids_TX, weights_TX, stacks)
        whole = tuple(jnp.stack(matrices) for matrices in stacks)

        def read(expert: Array) -> tuple[Array, ...]:
            return tuple(stack[expert].astype(x_TD.dtype) for stack in whole)

        return ffn_of(read, self.count, x_TD, ids_TX, weights_TX, TRANSPOSED)

    def axes(self) -> SeparateExperts:
        """There is one device."""
        return jax.tree.map(lambda _: (), self)


def _branch_by_branch(x_TD: Array, ids_TX: Array, weights_TX: Array, stacks: tuple[tuple[Any, ...], ...]) -> Array:
    """One branch per expert, closed over that expert's own arrays: nothing is copied, inactive experts are not read."""
    y_TD = jnp.zeros(x_TD.shape, jnp.float32)
    for expert, matrices in enumerate(zip(*stacks)):

        def visit(y: Array, expert=expert, matrices=matrices) -> Array:
            matrices = [matrix.astype(x_TD.dtype) for matrix in matrices]
            return y + coefficients(ids_TX, weights_TX, expert) * swiglu(x_TD, *matrices, axes=TRANSPOSED)

        y_TD = jax.lax.cond(jnp.any(ids_TX == expert), visit, lambda y: y, y_TD)
    return y_TD


def pack(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Parameters of any file format; activations are float32, too."""
    return dataclasses.replace(config, dtype="float32"), transpose(expand(params))


def transpose(params: Params) -> Params:
    """Plain parameters, of a target or of a drafter."""

    def ready(path: Any, node: Any) -> Any:
        if is_moe(node):
            separate = (tuple(jnp.asarray(matrix.T) for matrix in node[name]) for name in STACKS)
            return with_experts({name: jnp.asarray(leaf) for name, leaf in node.items()}, SeparateExperts(*separate))
        return TransposedMatrix.of(node) if is_matrix(path) else jnp.asarray(node)

    return jax.tree_util.tree_map_with_path(ready, params, is_leaf=is_moe)
