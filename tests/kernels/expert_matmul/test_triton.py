"""The Triton backend without a GPU: numbers in Triton's interpreter, machine code for three generations."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels import topology
from pallas_kernels.devices import compiling_for
from pallas_kernels.expert_matmul import PackedExperts
from pallas_kernels.expert_matmul.shapes import PRO_TP8
from pallas_kernels.hardware import GPUS
from tests.kernels.triton_tools import needs_compiler, needs_torch, needs_triton, run_interpreted

pytestmark = needs_triton


@needs_torch
def test_interpreted_kernels_agree():
    """Decode and prefill groups, all on one expert and some on none, within float32's rounding of the definition."""
    run_interpreted("expert_matmul")


@needs_compiler
@pytest.mark.parametrize(("gpu", "capability"), [("h200", 80), ("h200", 90), ("b200", 100)])
def test_it_compiles_for_each_generation(gpu, capability):
    """Code of Ampere, Hopper and Blackwell for Pro at TP8, with no such GPU here; nothing copies a stack."""
    from pallas_kernels.expert_matmul import triton

    sharding = SingleDeviceSharding(topology.devices(GPUS[gpu], 1)[0])
    tokens, shape = 8, PRO_TP8

    def argument(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def stack(rows: int, cols: int):
        return tuple(argument((shape.experts, rows, cols // part), jnp.uint8) for part in (2, 32))

    wide = stack(shape.features, shape.hidden)
    experts = PackedExperts(wide, wide, stack(shape.hidden, shape.features))
    x = argument((tokens, shape.hidden), jnp.bfloat16)
    ids, weights = (argument((tokens, shape.chosen), dtype) for dtype in (jnp.int32, jnp.float32))
    with compiling_for(capability):
        traced = jax.jit(triton.expert_ffn, static_argnums=(4, 5)).trace(x, ids, weights, experts, 0, shape.experts)
    assert f"compute_capability={capability}" in str(traced.jaxpr)
    assert traced.lower().compile().memory_analysis().temp_size_in_bytes < 64e6  # a stack has 302 MB
