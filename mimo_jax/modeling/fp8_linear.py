"""Linear maps by block-FP8 weights that stay codes: a kernel where one serves the call, or the sums of blocks."""

from __future__ import annotations

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from mimo_jax.quantization import BlockFp8Tensor, Weight, multiply_fp8, suits_fp8
from mimo_jax.quantization.fp8 import BLOCK
from mimo_jax.sharding import MESH_AXES, current_mesh, spec_of
from pallas_kernels.fp8_matmul import choose

Axes = tuple[str | None, ...]


def fp8_linear(x: Float[Array, "... K"], weight: Weight, axes: Axes) -> Float[Array, "... *N"] | None:
    """x W^T in float32 for weights [..., N, K]; None where expanding them costs less, or where they are not FP8.

    `axes` are the weight's logical axes (`sharding.PARAMETERS`): on a mesh, no kernel runs without them.
    """
    if not isinstance(weight, BlockFp8Tensor):
        return None
    backend = choose(x, weight.codes)
    if backend != "reference" and _can_be_cut(weight, axes):
        return on_each_device(x, weight, axes, backend)
    return multiply_fp8(x, weight) if suits_fp8(weight, x) else None


def _can_be_cut(weight: BlockFp8Tensor, axes: Axes) -> bool:
    """Whether columns come in whole blocks, and the mesh, if any, cuts rows and columns only between blocks."""
    mesh, whole = current_mesh(), weight.shape
    if mesh is None:
        return whole[-1] % BLOCK == 0
    if not axes:
        return False
    part = NamedSharding(mesh, spec_of(axes)).shard_shape(whole)
    return part[-1] % BLOCK == 0 and (part[-2] % BLOCK == 0 or part[-2] == whole[-2])


def on_each_device(
    x: Float[Array, "B ... K"], weight: BlockFp8Tensor, axes: Axes, backend: str
) -> Float[Array, "B ... *N"]:
    """`multiply_fp8` of what each device of the mesh holds; by hand, for the compiler cannot partition a kernel."""
    if current_mesh() is None:
        return multiply_fp8(x, weight, backend)
    *rows, cols = axes

    def own(x: Array, weight: BlockFp8Tensor) -> Array:
        y = multiply_fp8(x, weight, backend)
        return y if cols is None else jax.lax.psum(y, MESH_AXES[cols])

    middle = (None,) * (x.ndim - 2)
    in_specs = (spec_of(("batch", *middle, cols)), spec_of(axes))
    out_specs = spec_of(("batch", *middle, *rows))
    return jax.shard_map(own, in_specs=in_specs, out_specs=out_specs, check_vma=False)(x, weight)
