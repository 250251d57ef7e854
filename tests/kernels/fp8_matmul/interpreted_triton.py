"""Runs the Triton kernels in Triton's interpreter and compares; a process of its own, for the switch is read at import.

TRITON_INTERPRET=1 python -m tests.kernels.fp8_matmul.interpreted_triton
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from pallas_kernels import triton_call
from pallas_kernels.fp8_matmul import triton as backend
from pallas_kernels.fp8_matmul.shapes import SMALL
from tests.kernels.fp8_matmul.samples import definition, relative_error, tokens_of, weights_of


def tensor(array) -> torch.Tensor:
    array = np.array(array)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def interpret(kernel, *arrays, out, grid, warps=4, stages=3, **constants):
    """In place of `triton_call.call`; memory that no program writes holds a number no product is."""
    y = torch.full(out.shape, -1e30)
    kernel[grid](*map(tensor, arrays), y, **constants)
    return jnp.asarray(y.numpy())


if __name__ == "__main__":
    triton_call.call = interpret
    codes, scales = weights_of(SMALL.chunks, SMALL.rows, SMALL.cols)
    for tokens in (1, 8, 11, 40, 70):
        # In float32: the interpreter keeps bf16 as integers, and multiplies those.
        x = tokens_of(tokens, SMALL.cols, jnp.float32)
        found = backend.fp8_matmul(x, jnp.asarray(codes), jnp.asarray(scales))
        error = relative_error(found, definition(x, codes, scales))
        assert error < 1e-6, (tokens, error)  # float32 sums in another order
    print("agreed")
