"""TurnedMatrix: a dense matrix the other way round, which XLA on CPU multiplies a few rows with faster."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TurnedMatrix:
    """A matrix [N, K] that is kept as [K, N]. Measured for blocks of 8 rows: docs/LOG.md."""

    matrix: Float[Array, "K N"]


def turn(weights_NK: Float[Array | np.ndarray, "... K"]) -> TurnedMatrix:
    """Turns a matrix; leading axes become one."""
    return TurnedMatrix(jnp.asarray(weights_NK.reshape(-1, weights_NK.shape[-1]).T))
