"""The Triton backend without a GPU: numbers in Triton's interpreter, machine code for two generations."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels import topology
from pallas_kernels.devices import compiling_for
from pallas_kernels.fp8_matmul import choose, fp8_matmul
from pallas_kernels.fp8_matmul.shapes import DOWN, GATE, QKV
from pallas_kernels.hardware import GPUS
from tests.kernels.triton_tools import needs_compiler, needs_torch, needs_triton, run_interpreted

pytestmark = needs_triton


@needs_torch
def test_interpreted_kernels_agree():
    """Both kernels, all finite codes, two chunks that end in a short block: within float32's rounding of float64."""
    run_interpreted("fp8_matmul")


@needs_compiler
@pytest.mark.parametrize(("gpu", "capability"), [("h200", 90), ("b200", 100)])
def test_it_compiles_for_each_generation(gpu, capability):
    """Pro at TP8, decoding and prefill, with no such GPU here: nothing is written but the products."""
    sharding = SingleDeviceSharding(topology.devices(GPUS[gpu], 1)[0])

    def argument(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    for shape in (QKV, GATE, DOWN):
        for tokens in (8, 256):
            x = argument((tokens, shape.cols), jnp.bfloat16)
            codes = argument((shape.chunks, shape.rows, shape.cols), jnp.float8_e4m3fn)
            scales = argument((shape.chunks, -(-shape.rows // 128), shape.cols // 128), jnp.float32)
            with compiling_for(capability):
                assert choose(x, codes) == "triton"
                traced = jax.jit(fp8_matmul).trace(x, codes, scales)
                program = traced.lower().compile()
            assert f"compute_capability={capability}" in str(traced.jaxpr)
            assert program.memory_analysis().temp_size_in_bytes < 1e5
            assert " copy(" not in program.as_text()


@pytest.mark.parametrize(
    ("capability", "dtype", "rows", "reason"),
    [
        (80, jnp.bfloat16, 200, "compute capability 8.0; E4M3 came with 8.9"),
        (90, jnp.float32, 200, "tokens of dtype float32"),
        (90, jnp.bfloat16, 2**24, "an array of 2147483648 elements"),
    ],
)
def test_what_it_does_not_serve_is_named(capability, dtype, rows, reason):
    """The reference takes such calls, and asking for Triton by name is an error that says why it does not."""
    x = jax.ShapeDtypeStruct((2, 128), dtype)
    codes = jax.ShapeDtypeStruct((1, rows, 128), jnp.float8_e4m3fn)
    scales = jax.ShapeDtypeStruct((1, -(-rows // 128), 1), jnp.float32)
    with compiling_for(capability):
        assert choose(x, codes) == "reference"
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(lambda *inputs: fp8_matmul(*inputs, backend="triton"), x, codes, scales)
