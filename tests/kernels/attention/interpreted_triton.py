"""Runs the Triton kernel in Triton's interpreter and compares; a process of its own, for the switch is read at import.

TRITON_INTERPRET=1 python -m tests.kernels.attention.interpreted_triton
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels import triton_call
from pallas_kernels.attention import triton as backend
from tests.kernels.attention.samples import definition, error, inputs


def interpret(kernel: Any, *arrays: jax.Array, out: Any, grid: tuple[int, ...], warps=4, stages=3, **constants):
    """`triton_call.call`; what the kernel does not write is NaN."""
    results = [torch.full(shape.shape, torch.nan) for shape in jax.tree.leaves(out)]
    kernel[grid](*(torch.from_numpy(np.array(array)) for array in arrays), *results, **constants)
    return jax.tree.unflatten(jax.tree.structure(out), [jnp.asarray(result.numpy()) for result in results])


def run(q, k, v, query, sink) -> np.ndarray:
    """In float32: the interpreter keeps bf16 as integers, and multiplies those."""
    arrays = map(jnp.asarray, (q, k, v, query))
    return np.asarray(backend.attend_long(*arrays, None if sink is None else jnp.asarray(sink)))


def check(shape, lengths, tokens, capacity, with_sink=True, programs=132, **widths) -> None:
    backend.PROGRAMS = programs
    *arrays, sink = inputs(shape, lengths, tokens, capacity, **widths)
    sink = sink if with_sink else None
    found = error(run(*arrays, sink), definition(*arrays, sink))
    # float32 sums, and exponentials of scores below 10.
    assert found < 3e-6, (shape, lengths, tokens, capacity, found)


def check_bits() -> None:
    """The first token of eight, and the same alone after a cache of another capacity.

    Another one lies in other rows of the tile, where numpy's products may round otherwise.
    """
    backend.PROGRAMS = 3
    q, k, v, query, sink = inputs((1, 1, 16), [460], 8, 512)
    whole = run(q, k, v, query, sink)
    alone = run(q[:, :1], k[:, :, :480], v[:, :, :480], query[:, :1], sink)
    np.testing.assert_array_equal(alone, whole[:, :1])


if __name__ == "__main__":
    triton_call.call = interpret
    check((1, 1, 16), [300], 8, 512, widths=(192, 128))
    check((1, 1, 4), [1], 1, 128)
    check((1, 2, 3), [200], 1, 256, with_sink=False)
    for lengths in ([8, 64], [65, 330]):
        check((2, 2, 3), lengths, 8, 330, programs=12)  # blocks distributed to three splits, some of which get none
    check((1, 2, 6), [300], 40, 333, programs=8)  # two tiles of rows for each key head, over two splits
    check_bits()
    print("agreed")
