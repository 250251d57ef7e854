"""Stored weights are finite numbers: one NaN spreads to every token, and no later step says where it came from."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mimo_jax.errors import UserError
from mimo_jax.weights import Params
from mimo_jax.weights.mxfp4 import check_scales
from mimo_jax.weights.params import Part, Weight, array_path
from pallas_kernels import mxfp4

_PIECE_BYTES = 1 << 20  # of a core's cache


def check_stored(weight: Weight, part: Part, array: np.ndarray, where: str) -> None:
    """Raises with `where` and the first bad index if an array of a file, or a part of it, holds NaN or infinity."""
    if weight.stored != "mxfp4":
        check_finite(array, where, "scale" if part.field == "scales" else "value")
    elif part.field == "scales":
        check_scales(array, where)


def check_finite(array: np.ndarray, where: str, what: str = "value") -> None:
    """Raises with `where` and the first bad index if floating-point numbers hold NaN or infinity."""
    if not is_finite(array):
        with np.errstate(invalid="ignore"):  # numpy warns of what is looked for
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise UserError(f"{where}: {what} {array[index]} at index {list(index)} is not a finite number")


def is_finite(array: np.ndarray) -> bool:
    """Whether no floating-point number is NaN or infinite, many times as fast as `np.isfinite` finds it for BF16.

    Their bits come after those of all finite numbers of the same sign: as signed integers for the positive ones, as
    unsigned integers for the negative ones. So two maxima tell.
    """
    size = array.dtype.itemsize
    largest = int(np.asarray(ml_dtypes.finfo(array.dtype).max, array.dtype).view(f"i{size}"))
    largest_negative = largest | 1 << (8 * size - 1)
    flat = array.reshape(-1).view(f"u{size}")
    length = _PIECE_BYTES // size
    pieces = (flat[start : start + length] for start in range(0, flat.size, length))
    return all(piece.max() <= largest_negative and piece.view(f"i{size}").max() <= largest for piece in pieces)


def check_leaves(weights: Iterable[Weight], params: Params, where: str) -> None:
    """`check_stored` for `weights` of a tree; of arrays that lie on several devices, this process's part."""
    for weight in weights:
        node = weight.of(params)
        for part in weight.parts:
            if weight.stored == "mxfp4" and part.field == "codes":  # every code is a number
                continue
            for array in _arrays_of(getattr(node, part.field) if part.field else node):
                if isinstance(array, np.ndarray) or not _is_clean(array):
                    check_stored(weight, part, np.asarray(array), f"{where}: {'/'.join(array_path(part))}")


def _arrays_of(leaf: jax.Array | np.ndarray) -> list[jax.Array | np.ndarray]:
    """What each device holds, once; NumPy's views of it where that is the host."""
    if isinstance(leaf, np.ndarray):
        return [leaf]
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    return [np.asarray(shard.data) if shard.device.platform == "cpu" else shard.data for shard in shards]


@jax.jit
def _is_clean(array: jax.Array) -> jax.Array:
    """`check_stored` where the array lies: an accelerator's is not copied to the host."""
    return jnp.all(array != mxfp4.NAN_SCALE if array.dtype == jnp.uint8 else jnp.isfinite(array))
