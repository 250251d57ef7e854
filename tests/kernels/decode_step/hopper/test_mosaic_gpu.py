"""The whole round as one kernel, compiled for H200s that are not there."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mimo_jax.config.geometry import target_of
from mimo_jax.config.presets import preset
from pallas_kernels import sass, topology
from pallas_kernels.decode_step.assigned import CTAS, shard_of
from pallas_kernels.decode_step.hopper import mosaic_gpu, state
from pallas_kernels.decode_step.hopper.plan import PUBLISHED, StepPlan
from pallas_kernels.decode_step.hopper.roles import FIELDS
from pallas_kernels.decode_step.hopper.table import EPOCH, table_of
from pallas_kernels.decode_step.schedule import Kind
from pallas_kernels.hardware import GPUS
from tests.kernels.triton_tools import ROOT, needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("unchecked")]
CONTEXT = 131_072
MOST_INSTRUCTIONS = 10_000
TINY = target_of(preset("mimo-tiny"))
# So that XLA makes one CUDA graph of a loop, however little is in it.
GRAPH = {
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL,WHILE,CONDITIONAL,COLLECTIVES",
}
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
    buffers = on_each(state.buffer_shapes(plan))
    return whole, (table, step, ids, on_each(state.weight_shapes(plan)), buffers)


@pytest.mark.parametrize(
    ("name", "devices", "tokens", "shared_by"),
    [
        ("mimo-v2.5-pro", 1, 1, 8),
        ("mimo-v2.5-pro", 1, 8, 8),
        ("mimo-v2.5-pro", 8, 8, 8),
        ("mimo-tiny", 1, 8, 1),
    ],
)
def test_a_round_is_one_kernel(name, devices, tokens, shared_by, tmp_path: Path, monkeypatch):
    """No spill, no stack, no temporary, no copy, no collective: nothing but the kernel; buffers change in place."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    program, arguments = program_of(name, devices, tokens, shared_by)
    compiled = jax.jit(program, donate_argnums=4).lower(*arguments).compile()
    (ptx,) = tmp_path.glob("*.ptx")
    registers, stack, spilled = sass.assemble(ptx, tmp_path / "kernel.cubin")
    assert stack == spilled == 0 and registers <= 96  # of 640 threads, before they share them out anew
    assert sass.instructions(tmp_path / "kernel.cubin") <= MOST_INSTRUCTIONS
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    assert memory.temp_size_in_bytes < 1024
    written = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[4])) // devices
    assert memory.alias_size_in_bytes == pytest.approx(written, rel=1e-3)
    assert " copy(" not in text and "all-" not in text and "fusion" not in text
    assert text.count("custom-call(") == 1


def test_a_loop_of_rounds_is_one_command_buffer(tmp_path: Path):
    """The GPU runs it without the host: a condition of one comparison, and a body that is the kernel and nothing else.

    The kernel counts its rounds itself.
    """
    program, arguments = program_of("mimo-tiny", 1, 8, 1)

    def rounds(table, step, ids, weights, buffers, count):
        def unfinished(buffers):
            return buffers.counts[EPOCH] < count

        return jax.lax.while_loop(unfinished, lambda held: program(table, step, ids, weights, held), buffers)

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=arguments[1].sharding)
    options = GRAPH | {"xla_dump_to": str(tmp_path)}
    jax.jit(rounds, donate_argnums=4, compiler_options=options).lower(*arguments, count).compile()
    (dump,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    kinds = re.findall(r"^ *\d+: (\w+)", dump.read_text(), re.M)
    assert kinds == ["kCommandBuffer", "kWhile", "kCustomKernel", "kCustomCall"]


RELOADED = """
import sys
import jax
import jax.experimental.mosaic.gpu  # which knows what the file calls
from jax.sharding import SingleDeviceSharding
from pallas_kernels import topology
from pallas_kernels.hardware import GPUS

exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
sharding = SingleDeviceSharding(topology.devices(GPUS["h200"], 1)[0])
arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval in exported.in_avals]
print(jax.jit(exported.call).lower(*arguments).compile().as_text().count("custom-call("))
"""


def test_an_exported_round_is_compiled_by_another_process(tmp_path: Path):
    """`jax.export` writes the kernel, and a process that has none of this package's code for it reads it."""
    pytest.importorskip("flatbuffers")  # which JAX writes with
    plan = StepPlan(target_of(preset("mimo-tiny")), PUBLISHED, 8, 256)
    table = table_of(plan)
    given = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (table.rows.shape, (4,), (plan.columns,)))
    arguments = (*given, state.weight_shapes(plan), state.buffer_shapes(plan))
    leaves, tree = jax.tree.flatten(arguments)

    @jax.jit
    def launch(*leaves):
        return jax.tree.leaves(mosaic_gpu.launch(plan, *jax.tree.unflatten(tree, leaves)))

    path = tmp_path / "round"
    path.write_bytes(jax.export.export(launch, platforms=["cuda"])(*leaves).serialize())
    command = [sys.executable, "-c", RELOADED, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["1"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 9}, "tokens=9 must be 1 to 8"),
        ({"ctas": 3}, "hidden_size=192 is more than 48 columns for each CTA"),
        ({"formats": PUBLISHED | {Kind.EXPERT_GATE_UP: "fp8"}}, "experts are stored in fp8, not in MXFP4"),
        ({"formats": PUBLISHED | {Kind.GATE_UP: "bf16"}}, "QKV is stored in fp8, gate and up in bf16"),
        (
            {"target": dataclasses.replace(TINY, experts=1024), "ctas": 30},
            "1024 experts are 35 for each CTA, more than",
        ),
    ],
)
def test_what_it_cannot_serve_is_named(changes, reason):
    """Before anything is lowered."""
    plan = StepPlan(TINY, PUBLISHED, 8, 256)
    assert plan.unsupported() is None
    assert reason in str(dataclasses.replace(plan, **changes).unsupported())
