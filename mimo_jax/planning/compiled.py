"""Compiles the real programs for GPUs that are not there, and reads off memory, transfers and wasted bytes.

`pallas_kernels.topology` says what that needs.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mimo_jax import layouts
from mimo_jax.decode import loop
from mimo_jax.decode.controls import alike
from mimo_jax.decode.drafter import Weights
from mimo_jax.decode.sampling import Greedy
from mimo_jax.decode.step import FlaxStep
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.errors import UserError
from mimo_jax.modeling.cache import init_cache
from mimo_jax.planning.hlo import executed, is_collective, parameter_shapes, result_shape
from mimo_jax.planning.machines import Target
from mimo_jax.planning.traffic import Plan, distinct_experts, round_reads
from mimo_jax.sharding import make_mesh, shapes_on
from mimo_jax.weights.params import abstract_tree
from pallas_kernels import topology
from pallas_kernels.attention import CHUNK
from pallas_kernels.devices import compiling_for

LARGE = 1_000_000  # bytes: smaller results stay in the caches of the chip
NEGLIGIBLE = 0.01  # of the bytes that a program needs
PREFILL_TOKENS = FlaxStep.prefill_buckets[-1]


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


def compile_programs(plan: Plan, target: Target, context: int) -> dict[str, Program]:
    """The prefill of a chunk and a drafted round, after a cache of `context` tokens."""
    mesh = make_mesh(plan.shape, topology.devices(target.gpu, target.count))
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
        drafter = DFlashDrafter(plan.drafter)
        self.mesh, self.rows = mesh, plan.shape.data  # one row decodes on every copy of the model
        layout = layouts.choose(mesh, plan.backend)
        target = layouts.abstract(layout, plan.config, abstract_tree(plan.weights()), plan.backend)
        own = abstract_tree(plan.drafter_weights())
        self.decoder = loop.Decoder(FlaxStep(plan.config, drafter.aux_layers, mesh), drafter)
        self.weights = Weights(self._on_mesh(target), self._on_mesh(own))
        self.cache = self._on_mesh(jax.eval_shape(lambda: init_cache(plan.config, self.rows, context)))
        self.draft_cache = self._on_mesh(jax.eval_shape(lambda: drafter.init_cache(self.rows, context)))
        self.logits = self._on_mesh(jax.ShapeDtypeStruct((self.rows, plan.config.vocab_size), jnp.float32))

    def _on_mesh(self, tree: Any) -> Any:
        """Where weights and caches lie."""
        return shapes_on(tree, self.mesh)

    def lower_prefill(self) -> Any:
        tokens = np.zeros((self.rows, PREFILL_TOKENS), np.int32)
        counts = np.full(self.rows, PREFILL_TOKENS, np.int32)
        return loop._prefill_chunk.lower(
            self.decoder, self.weights, tokens, counts, self.cache, self.draft_cache, self.logits
        )

    def lower_decode(self) -> Any:
        limits, controls = np.ones(self.rows, np.int32), alike(Greedy(), (), self.rows)
        keys = jax.eval_shape(lambda: loop.row_keys([0] * self.rows))
        arguments = (self.cache, self.draft_cache, self.logits, limits, keys, controls)
        state = jax.eval_shape(lambda *inputs: loop._start(self.decoder, *inputs), *arguments)
        return loop._decode.lower(self.decoder, self.weights, self._on_mesh(state), controls, np.int32(1))


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
    visits = distinct_experts(plan.config, tokens) / plan.shape.expert
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
