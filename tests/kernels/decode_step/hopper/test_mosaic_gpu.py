"""The whole round as one kernel, compiled for H200s that are not there."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mimo_jax.config.presets import preset
from mimo_jax.decode.geometry import target_of
from pallas_kernels import sass, topology
from pallas_kernels.decode_step.assigned import CTAS, shard_of
from pallas_kernels.decode_step.hopper import mosaic_gpu, state
from pallas_kernels.decode_step.hopper.plan import StepPlan
from pallas_kernels.decode_step.hopper.roles import FIELDS
from pallas_kernels.decode_step.hopper.table import SHARED
from pallas_kernels.decode_step.schedule import Kind
from pallas_kernels.hardware import GPUS
from tests.kernels.triton_tools import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("unchecked")]
PUBLISHED = {
    Kind.QKV: "fp8",
    Kind.OUTPUT: "bf16",
    Kind.GATE_UP: "fp8",
    Kind.DOWN: "fp8",
    Kind.EXPERT_GATE_UP: "mxfp4",
    Kind.HEAD: "bf16",
}
CONTEXT = 131_072
WHOLE, SPLIT = P(), P(mosaic_gpu.MESH_AXIS)


def program_of(name: str, devices: int, tokens: int, shared_by: int):
    """A launch on `devices`, each of which holds one of `shared_by` shares, and its arguments."""
    target = shard_of(target_of(preset(name)), shared_by)
    context = min(CONTEXT, preset(name).max_position)
    plan = StepPlan(target, PUBLISHED, tokens, context, aux_layers=(0, 2), devices=devices)
    mesh = Mesh(np.array(topology.devices(GPUS["h200"], devices)), (mosaic_gpu.MESH_AXIS,))

    def argument(shape, dtype, spec=WHOLE):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def on_each(tree):
        return jax.tree.map(lambda leaf: argument((devices * leaf.shape[0], *leaf.shape[1:]), leaf.dtype, SPLIT), tree)

    def launch(*arguments):
        return mosaic_gpu.launch(plan, *arguments)

    whole = jax.shard_map(
        launch, mesh=mesh, in_specs=(WHOLE, WHOLE, WHOLE, SPLIT, SPLIT), out_specs=SPLIT, check_vma=False
    )
    table = argument((CTAS, 12 * len(target.layers) + 5, FIELDS), jnp.int32)
    step, ids = argument((4,), jnp.int32), argument((plan.columns,), jnp.int32)
    buffers = on_each(state.buffer_shapes(plan, len(SHARED) + CTAS))
    return whole, (table, step, ids, on_each(state.weight_shapes(plan)), buffers)


@pytest.mark.parametrize(
    ("name", "devices", "tokens", "shared_by", "most"),
    [
        ("mimo-v2.5-pro", 1, 1, 8, 10_000),
        ("mimo-v2.5-pro", 1, 8, 8, 10_000),
        ("mimo-v2.5-pro", 8, 8, 8, 10_500),
        ("mimo-tiny", 1, 8, 1, 10_000),
    ],
)
def test_a_round_is_one_kernel(name, devices, tokens, shared_by, most, tmp_path: Path, monkeypatch):
    """No spill, no stack, no temporary, no copy, no collective: nothing but the kernel; buffers change in place."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    program, arguments = program_of(name, devices, tokens, shared_by)
    compiled = jax.jit(program, donate_argnums=4).lower(*arguments).compile()
    (ptx,) = tmp_path.glob("*.ptx")
    registers, stack, spilled = sass.assemble(ptx, tmp_path / "kernel.cubin")
    assert stack == spilled == 0 and registers <= 96  # of 640 threads, before they share them out anew
    assert sass.instructions(tmp_path / "kernel.cubin") <= most
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    assert memory.temp_size_in_bytes < 64
    written = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[4])) // devices
    assert memory.alias_size_in_bytes == pytest.approx(written, rel=1e-3)
    assert " copy(" not in text and "all-" not in text and "fusion" not in text
    assert text.count("custom-call(") == 1
