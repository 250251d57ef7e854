"""What the Hopper kernels cost, without a GPU: compiled for an H200 that is not there, taken apart, counted."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from pallas_kernels import sass, topology
from pallas_kernels.expert_matmul import mosaic_gpu
from pallas_kernels.expert_matmul.hopper_layout import HopperExperts, Tiling, down_tiling, gate_up_tiling
from pallas_kernels.expert_matmul.schedule import Schedule
from pallas_kernels.expert_matmul.shapes import SHAPES, Shape
from pallas_kernels.hardware import GPUS


def missing() -> str | None:
    """What keeps the report from being made here, and what helps; None if nothing does."""
    if (problem := topology.missing()) is not None:
        return problem
    return None if sass.tool("nvdisasm") else "nvdisasm is missing: nvidia-cuda-nvdisasm"


def rows(shapes: Sequence[str], tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One of each kernel, for each of the named shapes and numbers of tokens, as soon as it is compiled."""
    (device,) = topology.devices(GPUS["h200"], 1)
    for name in shapes:
        shape = SHAPES[name]
        for count in tokens:
            costs, temporaries, copies = compile_op(shape, count, device)
            groups = expected_groups(shape, count)
            for kernel, tiling, cost in zip(("gate_up", "down"), _tilings(shape), costs):
                config = mosaic_gpu.HOPPER.kernel_config(tiling, count, shape.chosen, shape.experts)
                largest, requested = balance(config.schedule, groups)
                yield {
                    "shape": name,
                    "tokens": count,
                    "kernel": kernel,
                    "groups": groups,
                    **dataclasses.asdict(cost),
                    "shared_bytes": config.shared_bytes,
                    "stages": config.stages,
                    "max/mean": largest,
                    "requested/needed": requested,
                    "temporaries": temporaries,
                    "copies": copies,
                }


def compile_op(shape: Shape, tokens: int, device: jax.Device) -> tuple[list[sass.Cost], int, int]:
    """Costs of the two kernels of one call; bytes of temporaries; copies of a stack in the compiled program."""
    sharding = SingleDeviceSharding(device)

    def argument(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def stack(tiling: Tiling) -> jax.ShapeDtypeStruct:
        return argument((shape.experts, tiling.k_splits, tiling.stages, tiling.stage_words), jnp.int32)

    experts = HopperExperts(*map(stack, _tilings(shape)))
    ids, weights = (argument((tokens, shape.chosen), dtype) for dtype in (jnp.int32, jnp.float32))
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1"}
        lowered = jax.jit(mosaic_gpu.expert_ffn, static_argnums=(4, 5)).lower(
            argument((tokens, shape.hidden), jnp.bfloat16), ids, weights, experts, 0, shape.experts
        )
        program = lowered.compile()
        # Gate and up come first, and are numbered first.
        dumped = sorted(Path(folder).glob("*.ptx"), key=lambda path: int(path.stem.split("_")[-1]))
        costs = [sass.cost_of(path, min(-(-tokens // 8), 2)) for path in dumped]
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None
    return costs, memory.temp_size_in_bytes, text.count(" copy(%experts")


def balance(schedule: Schedule, groups: int) -> tuple[float, float]:
    """The most work of an SM over the mean; bytes of weights requested over those needed, for so many groups."""
    works = [schedule.sm_work(sm, groups) for sm in range(schedule.sms)]
    items = np.array([sum(work.content(index).count for index in range(work.stages)) for work in works])
    needed = groups * schedule.tiling.rows * schedule.tiling.cols * 17 // 32
    return float(items.max() / items.mean()), float(items.sum() * schedule.item_bytes / needed)


def expected_groups(shape: Shape, tokens: int) -> int:
    """Distinct experts of tokens that choose independently and uniformly; few have more pairs than a group holds."""
    return round(shape.experts * (1 - (1 - shape.chosen / shape.experts) ** tokens))


def _tilings(shape: Shape) -> tuple[Tiling, Tiling]:
    return gate_up_tiling(shape.hidden, shape.features), down_tiling(shape.hidden, shape.features)
