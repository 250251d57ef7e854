"""The Triton backend without a GPU: numbers in Triton's interpreter, machine code for three generations."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding

from mimo_jax.modeling.attention import attend_rows
from mimo_jax.modeling.cache import CACHE_AXES, LayerCache
from mimo_jax.sharding import MeshShape, make_mesh, spec_of, using
from pallas_kernels import topology
from pallas_kernels.attention.shapes import PRO_TP8
from pallas_kernels.devices import compiling_for
from pallas_kernels.hardware import GPUS
from tests.kernels.triton_tools import needs_compiler, needs_torch, needs_triton, run_interpreted

pytestmark = needs_triton
CAPACITY = 1 << 17


@needs_torch
def test_interpreted_kernels_agree():
    """Any length, block of tokens and grouping, with and without sinks, within float32's rounding of the definition."""
    run_interpreted("attention")


@needs_compiler
@pytest.mark.parametrize("tokens", [8, 256])
@pytest.mark.parametrize(("gpu", "capability"), [("h200", 80), ("h200", 90), ("b200", 100)])
def test_it_compiles_for_each_generation(gpu, capability, tokens):
    """Code of Ampere, Hopper and Blackwell for Pro at TP8, with no such GPU here; 84 MB of cache are not copied."""
    from pallas_kernels.attention import triton

    sharding = SingleDeviceSharding(topology.devices(GPUS[gpu], 1)[0])
    shape = PRO_TP8

    def argument(dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    q = argument((1, tokens, shape.heads, shape.key_width))
    k, v = (argument((1, shape.kv_heads, CAPACITY, width)) for width in (shape.key_width, shape.value_width))
    with compiling_for(capability):
        lowered = jax.jit(triton.attend_long).lower(q, k, v, argument((1, tokens), jnp.int32), argument((shape.heads,)))
    program = lowered.compile()
    assert program.memory_analysis().temp_size_in_bytes < 10e6  # scores of 8 tokens have 67 MB
    assert " copy(" not in program.as_text()


@needs_compiler
def test_eight_devices_keep_to_their_own_heads():
    """Pro on 8xH200: each device runs the kernel on its eighth of the cache; nothing is sent, nothing is copied."""
    mesh = make_mesh(MeshShape(tensor=8), topology.devices(GPUS["h200"], 8))

    def argument(dims, axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec_of(axes)))

    heads, kv_heads = 8 * PRO_TP8.heads, 8 * PRO_TP8.kv_heads
    q = argument((1, 8, heads, PRO_TP8.key_width), ("batch", None, "heads", None))
    widths = PRO_TP8.key_width, PRO_TP8.value_width
    layer = LayerCache(*(argument((1, kv_heads, CAPACITY, width), CACHE_AXES) for width in widths))

    def run(q, layer, query, sink):
        with using(mesh):
            return attend_rows(q, layer, query, sink)

    with compiling_for(90):
        lowered = jax.jit(run).lower(q, layer, argument((1, 8), (None,), jnp.int32), argument((heads,), ("heads",)))
    program = lowered.compile()
    memory, text = program.memory_analysis(), program.as_text()
    assert memory.argument_size_in_bytes == pytest.approx(CAPACITY * PRO_TP8.position_bytes, rel=1e-3)
    assert "triton_kernel_call" in text and memory.temp_size_in_bytes < 10e6 and " copy(" not in text
    assert not any(f" {name}" in text for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))
