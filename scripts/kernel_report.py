"""What the expert kernels cost, without a GPU: compiled for an H200 that is not there, taken apart, counted.

scripts/kernel_report.py [--shapes pro-tp8 flash-tp8] [--tokens 1 8 16 256]

Needs the CUDA plugin and nvdisasm: `pip install --no-deps` what `mimo_jax.planning.compiled.INSTALL` names, and
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from mimo_jax.cli import main_guard
from mimo_jax.errors import UserError
from mimo_jax.planning import compiled
from mimo_jax.planning.machines import parse_target
from pallas_kernels import sass
from pallas_kernels.expert_matmul import mosaic_gpu, schedule
from pallas_kernels.expert_matmul.layout import TiledExperts, Tiling, down_tiling, gate_up_tiling
from pallas_kernels.expert_matmul.shapes import SHAPES, Shape


def compile_op(shape: Shape, tokens: int, device: jax.Device) -> tuple[list[sass.Cost], int, int]:
    """Costs of the two kernels of one call; bytes of temporaries; copies of a stack in the compiled program."""
    sharding = SingleDeviceSharding(device)

    def argument(dims: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def stack(cut: Tiling) -> jax.ShapeDtypeStruct:
        return argument((shape.experts, cut.granules, cut.slots, cut.slot_words), jnp.int32)

    experts = TiledExperts(*map(stack, _cuts(shape)))
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


def _cuts(shape: Shape) -> tuple[Tiling, Tiling]:
    return gate_up_tiling(shape.hidden, shape.features), down_tiling(shape.hidden, shape.features)


def balance(deal: schedule.Shares, groups: int) -> tuple[float, float]:
    """The largest part over the mean; bytes of weights requested over those needed, for so many groups."""
    parts = [deal.of(processor, groups) for processor in range(deal.processors)]
    counts = np.array([sum(part.place(index).count for index in range(part.slots)) for part in parts])
    needed = groups * deal.cut.rows * deal.cut.cols * 17 // 32
    return float(counts.max() / counts.mean()), float(counts.sum() * deal.unit_bytes / needed)


def expected_groups(shape: Shape, tokens: int) -> int:
    """Distinct experts of tokens that choose independently and uniformly; few have more pairs than a group holds."""
    return round(shape.experts * (1 - (1 - shape.chosen / shape.experts) ** tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["pro-tp8", "flash-tp8"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 256])
    args = parser.parse_args()
    problem = compiled.missing() or (None if sass.tool("nvdisasm") else "nvdisasm is missing: nvidia-cuda-nvdisasm")
    if problem:
        raise UserError(f"kernel_report: {problem}")
    (device,) = compiled.topology(parse_target("1xh200"))
    rows = []
    print("shape      tokens kernel   regs smem KB spills instr/weight  ALU/weight  max/mean  bytes")
    for name in args.shapes:
        shape = SHAPES[name]
        for tokens in args.tokens:
            costs, temporaries, copies = compile_op(shape, tokens, device)
            groups = expected_groups(shape, tokens)
            for kernel, cut, cost in zip(("gate_up", "down"), _cuts(shape), costs):
                plan = mosaic_gpu.HOPPER.plan(cut, tokens, shape.chosen, shape.experts)
                largest, requested = balance(plan.shares, groups)
                row = {"shape": name, "tokens": tokens, "kernel": kernel, "groups": groups, **dataclasses.asdict(cost)}
                row |= {"shared_bytes": plan.shared_bytes, "slots": plan.slots, "max/mean": largest}
                rows.append(row | {"requested/needed": requested, "temporaries": temporaries, "copies": copies})
                print(
                    f"{name:10} {tokens:6} {kernel:8} {cost.registers:4} {plan.shared_bytes / 1024:7.0f} "
                    f"{cost.spill_bytes:6} {cost.instructions:12.2f} {cost.alu:11.2f} {largest:9.3f} {requested:6.3f}"
                )
    print(json.dumps(rows))


if __name__ == "__main__":
    main_guard(main)
