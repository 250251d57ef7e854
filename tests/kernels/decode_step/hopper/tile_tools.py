"""A tile by itself as machine code for an H200 that is not there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import SingleDeviceSharding

from pallas_kernels import sass, topology
from pallas_kernels.hardware import GPUS
from pallas_kernels.lanes import emitted

MOST_REGISTERS = 112  # that each thread of four warpgroups beside one of roles can have
OPTIONS = plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
GLOBAL, SHARED = "global", "shared"
Memories = Sequence[tuple[str, int]]  # where each is, and its words


def ptx_of(kernel, arguments: Sequence[tuple[tuple[int, ...], Any]], folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """What Mosaic leaves behind of a kernel with arguments of these shapes and dtypes."""
    patch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
    patch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    sharding = SingleDeviceSharding(topology.devices(GPUS["h200"], 1)[0])
    placed = [jax.ShapeDtypeStruct(*argument, sharding=sharding) for argument in arguments]
    jax.jit(kernel).lower(*placed).compile()
    (ptx,) = folder.glob("*.ptx")
    return ptx


def machine_code(
    tile, memories: Memories, scalars: Sequence[str], folder: Path, patch: pytest.MonkeyPatch
) -> tuple[int, int, int]:
    """Registers, bytes of stack and bytes of spills of a tile."""
    sizes = [1 + len(scalars), *(words for place, words in memories if place == GLOBAL)]
    arguments = [((words,), jnp.int32) for words in sizes]
    return sass.assemble(ptx_of(_kernel(tile, memories, scalars), arguments, folder, patch), folder / "kernel.cubin")


def _kernel(tile, memories: Memories, scalars: Sequence[str]):
    shared = [plgpu.SMEM((words,), jnp.int32) for place, words in memories if place == SHARED]

    def body(numbers, *refs):
        *arrays, out = refs

        def scoped(*scratch):
            in_turn = {GLOBAL: iter(arrays), SHARED: iter(scratch)}
            first = {"first": numbers[len(scalars)]}
            for ref in scratch:
                emitted.call(_copy, (numbers, ref), first)
            values = {name: numbers[index] for index, name in enumerate(scalars)}
            emitted.call(tile, [next(in_turn[place]) for place, _ in memories], values)
            for ref in scratch:
                emitted.call(_copy, (ref, out), first)

        pl.run_scoped(scoped, *shared, collective_axes="warpgroup")

    return pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
        mesh=plgpu.Mesh(num_threads=1, thread_name="warpgroup"),
        compiler_params=OPTIONS,
    )


def _copy(lanes, memories, scalars) -> None:
    """Of something: or else the compiler would leave out what reads or writes memory that nobody else does."""
    source, target = memories
    index = lanes.thread + scalars["first"]
    lanes.barrier()
    lanes.store(lanes.load(source, index, "i32"), target, index)
    lanes.barrier()
