"""Compiles the real programs for GPUs that are not there, and reads off memory, transfers and wasted bytes.

XLA needs the CUDA plugin and its compiler tools for that, but no GPU: a topology described by a text file stands for
the machine.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mimo_jax import decoding
from mimo_jax.cache import init_cache
from mimo_jax.checkpoint.orbax import abstract_tree
from mimo_jax.drafting import BlockDrafter
from mimo_jax.errors import UserError
from mimo_jax.modeling.drafter import abstract_drafter
from mimo_jax.planning.hlo import executed, is_collective, parameter_shapes, result_shape
from mimo_jax.planning.machines import Target, target_description
from mimo_jax.planning.traffic import Plan, distinct_experts, round_reads
from mimo_jax.sampling import Greedy
from mimo_jax.sharding import cache_shardings, make_mesh, parameter_shardings, shapes_on
from mimo_jax.tiles import abstract_tiled, wants_tiles
from pallas_kernels import triton_call
from pallas_kernels.attention.reference import CHUNK
from pallas_kernels.devices import compiling_for

PACKAGES = {"jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"}
INSTALL = (
    "pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} nvidia-cuda-nvcc nvidia-nvvm "
    "jax-triton triton"
)
LARGE = 1_000_000  # bytes: smaller results stay in the caches of the chip
NEGLIGIBLE = 0.01  # of the bytes that a program needs
PREFILL_TOKENS = decoding.PREFILL_BUCKETS[-1]


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, per device; counts and bytes are those of one round."""

    seconds: float
    arguments: int
    temporaries: int
    collectives: dict[str, tuple[float, float]]  # kind and shape -> (how often, bytes in all)
    expansions: dict[str, float]  # where in the model -> bytes written beyond what the formulas know
    needed: float  # bytes read, by the formulas

    @property
    def beyond(self) -> dict[str, float]:
        """The expansions that matter."""
        return {place: nbytes for place, nbytes in self.expansions.items() if nbytes > NEGLIGIBLE * self.needed}


def missing() -> str | None:
    """What keeps programs from being compiled for GPUs here, and the command that helps; None if nothing does."""
    if PACKAGES <= {distribution.name for distribution in importlib.metadata.distributions()}:
        return None
    return "compiling needs the CUDA plugin, which is not installed: " + INSTALL.format(version=jax.__version__)


def without_triton() -> str | None:
    """That the compiled programs lack the Triton kernels, and the command that helps; None if they have them."""
    if triton_call.is_installed():
        return None
    return "without the Triton kernels, which move fewer bytes: pip install --no-deps jax-triton triton"


def topology(target: Target) -> list[Any]:
    """Devices of a compile-only machine."""
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be read back from it
    description = target_description(target.gpu)
    described = topologies.get_topology_desc(platform="cuda", target_config=description, topology=f"1x1x{target.count}")
    return list(described.devices)


def compile_programs(plan: Plan, target: Target, context: int) -> dict[str, Program]:
    """The prefill of a chunk and a drafted round, behind a cache of `context` tokens."""
    mesh = make_mesh(plan.layout, topology(target))
    # name -> (tokens, loops around what counts, the program): rounds are the body of the decoding loop.
    with compiling_for(10 * target.gpu.capability):
        inputs = _Inputs(plan, mesh, context)
        lowered = {
            "prefill": (PREFILL_TOKENS, 0, inputs.lower_prefill()),
            "drafted round": (plan.drafter.block_size, 1, inputs.lower_decode()),
        }
    with ThreadPoolExecutor() as pool:  # XLA compiles each on one core
        programs = {name: pool.submit(_compiled, plan, context, *entry) for name, entry in lowered.items()}
        return {name: program.result() for name, program in programs.items()}


class _Inputs:
    """Shapes, dtypes and shardings of everything the programs take."""

    def __init__(self, plan: Plan, mesh: Mesh, context: int) -> None:
        drafter = BlockDrafter(plan.drafter)
        self.mesh, self.rows = mesh, plan.layout.data  # one row decodes on every copy of the model
        config, target = plan.config, abstract_tree(plan.config)
        if wants_tiles(config):
            config, target = dataclasses.replace(config, storage="tiled"), abstract_tiled(target)
        target = shapes_on(target, parameter_shardings(target, mesh))
        self.engine = decoding.Engine(decoding.FlaxStep(config, drafter.taps, mesh), drafter)
        own = abstract_drafter(plan.drafter)
        self.weights = decoding.Weights(target, shapes_on(own, parameter_shardings(own, mesh)))
        self.cache = self._on_mesh(jax.eval_shape(lambda: init_cache(plan.config, self.rows, context)))
        self.draft_cache = self._on_mesh(jax.eval_shape(lambda: drafter.init_cache(self.rows, context)))
        self.logits = self._on_mesh(jax.ShapeDtypeStruct((self.rows, plan.config.vocab_size), jnp.float32))

    def _on_mesh(self, tree: Any) -> Any:
        """Caches by heads, everything else on every device."""
        return shapes_on(tree, cache_shardings(tree, self.mesh))

    def lower_prefill(self) -> Any:
        tokens = np.zeros((self.rows, PREFILL_TOKENS), np.int32)
        counts = np.full(self.rows, PREFILL_TOKENS, np.int32)
        return decoding._prefill_chunk.lower(
            self.engine, self.weights, tokens, counts, self.cache, self.draft_cache, self.logits
        )

    def lower_decode(self) -> Any:
        limits, stops = np.ones(self.rows, np.int32), np.zeros(1, np.int32)
        keys = jax.eval_shape(lambda: decoding.row_keys([0] * self.rows))
        arguments = (self.cache, self.draft_cache, self.logits, limits, keys, stops, Greedy())
        state = jax.eval_shape(lambda *inputs: decoding.start(self.engine, *inputs), *arguments)
        return decoding.decode.lower(self.engine, self.weights, self._on_mesh(state), stops, Greedy(), np.int32(1))


def _compiled(plan: Plan, context: int, tokens: int, depth: int, lowered: Any) -> Program:
    started = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"plan: the compiler refused the program ({str(error).splitlines()[0][:300]})") from None
    seconds = time.perf_counter() - started
    memory = program.memory_analysis()
    collectives, expansions = _moved(plan, context, tokens, depth, program.as_text())
    needed = sum(round_reads(plan, tokens, context, draft=depth > 0).values())
    return Program(seconds, memory.argument_size_in_bytes, memory.temp_size_in_bytes, collectives, expansions, needed)


def _moved(
    plan: Plan, context: int, tokens: int, depth: int, text: str
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Collectives, and large intermediate results, of what runs `depth` loops deep.

    Loops further in visit experts, or chunks of a long cache.
    """
    visits = distinct_experts(plan.config, tokens) / plan.layout.expert
    chunks = -(-context // CHUNK)
    carried = parameter_shapes(text)
    collectives: dict[str, tuple[float, float]] = collections.defaultdict(lambda: (0.0, 0.0))
    expansions: dict[str, float] = collections.defaultdict(float)
    for step in executed(text):
        if len(step.loops) < depth:
            continue
        instruction, times = step.instruction, 1.0
        if len(step.loops) > depth:
            times = chunks if "/attention/" in instruction.source else visits
        if is_collective(instruction):
            key = f"{instruction.opcode.removesuffix('-start')} {result_shape(instruction)}"
            count, nbytes = collectives[key]
            collectives[key] = count + times, nbytes + times * instruction.nbytes
        elif instruction.source.endswith("scatter") and instruction.shape in carried:
            continue  # a few rows of a cache, in place
        elif instruction.nbytes >= LARGE and not instruction.opcode.endswith("-done"):
            expansions[_place(instruction.source)] += times * instruction.nbytes
    return dict(collectives), dict(expansions)


def _place(source: str) -> str:
    """Where in the model, the same for all layers: "layers/attention/project: convert_element_type"."""
    wrappers = ("jit(", "while", "body", "shard_map", "closed")
    parts = [part for part in source.split("/") if not part.startswith(wrappers)]
    parts = ["layers" if part.startswith("layers_") else part for part in parts]
    return "/".join(dict.fromkeys(parts[-4:])) or "unnamed"
