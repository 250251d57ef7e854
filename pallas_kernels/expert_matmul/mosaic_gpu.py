"""The experts on Hopper: one persistent kernel for gate and up, one for down; packed weights go straight to registers.

Every SM takes an equal, contiguous part of a list of (work group, tile) that the routing decides; a work group is an
expert with up to 16 columns of activations. One warp keeps a pipeline of stages in shared memory full of weights by
bulk copies; four warpgroups take the stages in turn (`mosaic_tile`). The activations that a stage needs are a panel,
and panels have a pipeline of their own: the activation buffers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import Shaped
from pallas_kernels.devices import on_hopper
from pallas_kernels.expert_matmul import mosaic_plain, mosaic_tile, reference
from pallas_kernels.expert_matmul.hopper_layout import (
    ROWS,
    WARPS,
    HopperExperts,
    PackedExperts,
    Tiling,
    down_tiling,
    gate_up_tiling,
)
from pallas_kernels.expert_matmul.schedule import Schedule, SmWork, StageContent, sorted_work_list, work_list
from pallas_kernels.hardware import GPUS

CONSUMERS = 4  # warpgroups that compute: four warps for each of the four schedulers of an SM
BARRIER_BYTES = 1024  # of shared memory, kept free
SHARED_MEMORY = GPUS["h200"].shared_memory_per_block - BARRIER_BYTES
MAX_STAGES = 16
MAX_BUFFERS = 2  # of a chunk; a panel serves more stages than the pipeline has, so one of two buffers is free in time
MAX_PAIRS = 128  # of a block, for its list of work compares all with all
GROUP_COLUMNS = 16  # of a work group when tokens are many
CHUNK_TOKENS = 256  # at a time, for the results of all pairs lie in memory before they are added up


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """What a kernel is compiled for."""

    schedule: Schedule
    columns: int  # 8 or 16
    pairs: int  # rows of the result
    buffers: int  # panels that shared memory holds at a time
    consumers: int = CONSUMERS
    max_stages: int = MAX_STAGES
    interpret: Any = None

    @property
    def tiling(self) -> Tiling:
        return self.schedule.tiling

    @property
    def are_buffers_reused(self) -> bool:
        return self.buffers < self.schedule.max_panels

    @property
    def buffer_shape(self) -> tuple[int, int]:
        return self.columns, self.tiling.panel_cols + mosaic_tile.BUFFER_GAP

    @property
    def sums_shape(self) -> tuple[int, int]:
        return WARPS, self.columns * mosaic_tile.SUM_STRIDE

    @property
    def stages(self) -> int:
        """Of the pipeline: what fits beside the buffers, a multiple of the consumers, each of which has its own."""
        fitting = (SHARED_MEMORY - self._fixed_bytes) // (4 * self.tiling.stage_words)
        return min(fitting, self.max_stages) // self.consumers * self.consumers

    @property
    def shared_bytes(self) -> int:
        """Of shared memory."""
        return self._fixed_bytes + 4 * self.tiling.stage_words * self.stages

    @property
    def _fixed_bytes(self) -> int:
        buffers = 2 * self.buffers * self.buffer_shape[0] * self.buffer_shape[1]
        return buffers + 4 * self.consumers * self.sums_shape[0] * self.sums_shape[1]


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """What the kernels run on; the interpreter takes fewer and smaller of everything."""

    sms: int = GPUS["h200"].sms
    consumers: int = CONSUMERS
    max_stages: int = MAX_STAGES
    interpret: Any = None

    def kernel_config(self, tiling: Tiling, tokens: int, chosen: int, num_experts: int) -> KernelConfig:
        """For so many tokens at once, each of which chooses some of so many experts."""
        pairs, is_block = tokens * chosen, tokens <= reference.DECODE_TOKENS
        columns = -(-tokens // mosaic_tile.COLUMNS) * mosaic_tile.COLUMNS if is_block else GROUP_COLUMNS
        groups = pairs if is_block else reference.max_groups(pairs, num_experts, columns)
        schedule = Schedule(tiling, self.sms, groups, is_block and tiling.by_columns)
        buffers = schedule.max_panels if is_block else min(schedule.max_panels, MAX_BUFFERS)
        return KernelConfig(schedule, columns, pairs, buffers, self.consumers, self.max_stages, self.interpret)


HOPPER = LaunchConfig()


def unsupported(x_TD: Shaped, ids_TX: Shaped, experts: PackedExperts | HopperExperts) -> str | None:
    """What keeps this backend from serving a call."""
    if not on_hopper():
        return f"JAX's default device is {jax.devices()[0].device_kind!r}, not an NVIDIA GPU of compute capability 9.0"
    if isinstance(experts, PackedExperts):
        return "the experts are in the published layout; `to_hopper` puts them into the Hopper layout, once, at load"
    if x_TD.dtype != jnp.bfloat16:
        return f"tokens of dtype {x_TD.dtype}, not bfloat16"
    if x_TD.shape[0] <= reference.DECODE_TOKENS and ids_TX.size > MAX_PAIRS:
        return f"{ids_TX.size} (token, expert) pairs in a block of {x_TD.shape[0]}, more than {MAX_PAIRS}"
    num_experts, hidden, features = experts.sizes
    tokens, chosen = ids_TX.shape
    for tiling in (gate_up_tiling(hidden, features), down_tiling(hidden, features)):
        if HOPPER.kernel_config(tiling, min(tokens, CHUNK_TOKENS), chosen, num_experts).stages < CONSUMERS:
            return f"experts of {hidden} x {features}, whose tiles and activations do not fit into shared memory"
    return None


def expert_ffn(
    x_TD: Float[Array, "T D"],
    ids_TX: Int[Array, "T X"],
    weights_TX: Float[Array, "T X"],
    experts: HopperExperts,
    first: int,
    num_experts: int,
    launch: LaunchConfig = HOPPER,
) -> Float[Array, "T D"]:
    """`api.expert_ffn` on rows `first` and following of the stacks."""
    tokens, chosen = ids_TX.shape
    if tokens > CHUNK_TOKENS:
        return _by_chunks(x_TD, ids_TX, weights_TX, experts, first, num_experts, launch)
    _, hidden, features = experts.sizes
    config = launch.kernel_config(gate_up_tiling(hidden, features), tokens, chosen, num_experts)
    list_work = work_list if tokens <= reference.DECODE_TOKENS else sorted_work_list
    work = list_work(ids_TX, num_experts, config.columns)
    tables = (work.experts_U + first, work.pairs_Uc, work.count)
    sums_PkO = matmul(config, x_TD, work.tokens_Uc, experts.gate_up, *tables)
    hidden_PF = _activate(sums_PkO).astype(x_TD.dtype)

    config = launch.kernel_config(down_tiling(hidden, features), tokens, chosen, num_experts)
    sums_PkD = matmul(config, hidden_PF, jnp.maximum(work.pairs_Uc, 0), experts.down, *tables)
    return _combine(_total(sums_PkD), work.own_pair_TX, weights_TX)


def _by_chunks(x_TD: Array, ids_TX: Array, weights_TX: Array, experts, first, num_experts, launch) -> Array:
    """One chunk of tokens after the other, of equal lengths."""
    tokens = x_TD.shape[0]
    chunks = -(-tokens // CHUNK_TOKENS)
    length = -(-tokens // chunks)

    def split(rows: Array, value: int) -> Array:
        padded = jnp.pad(rows, ((0, chunks * length - tokens), (0, 0)), constant_values=value)
        return padded.reshape(chunks, length, -1)

    def run(chunk: tuple[Array, Array, Array]) -> Array:
        x, ids, weights = chunk
        return expert_ffn(x, ids, weights, experts, first, num_experts, launch)

    y = jax.lax.map(run, (split(x_TD, 0), split(ids_TX, num_experts), split(weights_TX, 0)))
    return y.reshape(-1, x_TD.shape[1])[:tokens]


def _total(sums_PkO: Array) -> Array:
    """The K splits' sum in their order, whatever a compiler thinks of sums."""
    total_PO = sums_PkO[:, 0]
    for k_split in range(1, sums_PkO.shape[1]):
        total_PO = total_PO + sums_PkO[:, k_split]
    return total_PO


def _activate(sums_PkO: Array) -> Array:
    """silu(gate) * up, whose rows alternate by eights."""
    total_PO = _total(sums_PkO)
    halves = total_PO.reshape(total_PO.shape[0], -1, 2, ROWS // 2)
    gate, up = (halves[:, :, which].reshape(total_PO.shape[0], -1) for which in (0, 1))
    return jax.nn.silu(gate) * up


def _combine(y_PD: Array, own_TX: Array, weights_TX: Array) -> Array:
    y_TD = jnp.zeros((own_TX.shape[0], y_PD.shape[1]), jnp.float32)
    for choice in range(own_TX.shape[1]):
        own_T, weight_T = own_TX[:, choice], weights_TX[:, choice].astype(jnp.float32)
        part_TD = y_PD[jnp.maximum(own_T, 0)] * weight_T[:, None]
        y_TD = y_TD + jnp.where((own_T >= 0)[:, None], part_TD, 0)
    return y_TD


class _Shared(NamedTuple):
    """Shared memory of a kernel: weights by pipeline stage, panels by activation buffer, sums, and the barriers."""

    stage_empty: Any
    stage_full: Any
    activations: Any
    buffer_empty: Any
    buffer_full: Any
    weights: Any
    sums: Any


@functools.partial(jax.jit, static_argnums=0)  # so that all layers of a program share one lowered kernel
def matmul(
    config: KernelConfig,
    x_TI: Float[Array, "T I"],
    rows_Uc: Int[Array, "U c"],
    words: Int[Array, "E k_splits stages words"],
    experts_U: Int[Array, "U"],
    pairs_Uc: Int[Array, "U c"],
    count: Int[Array, "1"],
) -> Float[Array, "P k_splits O"]:
    """The products of each group's expert with its columns, one row per pair.

    `rows_Uc` says which row of `x_TI` a column is, `pairs_Uc` which pair it is for (-1: none). `count` groups exist.
    Rows of pairs that do not occur stay undefined.
    """
    tiling = config.tiling
    kernel = plgpu.kernel(
        functools.partial(_body, config),
        out_type=jax.ShapeDtypeStruct((config.pairs, tiling.k_splits, tiling.rows), jnp.float32),
        grid=(config.schedule.sms,),
        grid_names=("sm",),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        scratch_types=_Shared(
            stage_empty=plgpu.Barrier(num_barriers=config.stages),
            stage_full=plgpu.Barrier(num_barriers=config.stages),
            activations=plgpu.SMEM((config.buffers, *config.buffer_shape), jnp.bfloat16),
            buffer_empty=plgpu.Barrier(num_arrivals=config.consumers, num_barriers=config.buffers),
            buffer_full=plgpu.Barrier(num_arrivals=config.columns, num_barriers=config.buffers),
            weights=plgpu.SMEM((config.stages, tiling.stage_words), jnp.int32),
            sums=plgpu.SMEM((config.consumers, *config.sums_shape), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=config.interpret,
    )
    x_TkI = x_TI.reshape(x_TI.shape[0], tiling.k_splits, tiling.panel_cols)
    return kernel(x_TkI, rows_Uc.reshape(-1), words, experts_U, pairs_Uc.reshape(-1), count)


def _body(config: KernelConfig, x, rows, words, experts, pairs, count, out, *scratch: Any) -> None:
    shared = _Shared(*scratch)
    work = config.schedule.sm_work(jax.lax.axis_index("sm"), count[0])
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == config.consumers)
    def produce() -> None:
        _on_one_warp(config, lambda: _produce(config, work, x, rows, words, experts, shared))

    @pl.when(warpgroup < config.consumers)
    def consume() -> None:
        _consume(config, work, warpgroup, pairs, out, shared)


def _on_one_warp(config: KernelConfig, run: Callable[[], None]) -> None:
    if config.interpret is not None:
        run()  # the interpreter knows whole warpgroups only
        return

    plgpu.warp_map(lambda warp: pl.when(warp == 0)(run))


def _produce(config: KernelConfig, work: SmWork, x, rows, words, experts, shared: _Shared) -> None:
    """Fills the pipeline, and the activation buffers as the stages come to need them."""
    tiling, stages = config.tiling, config.stages

    def load(index: jax.Array, loaded: jax.Array) -> jax.Array:
        content = work.content(index)
        stage = jax.lax.rem(index, stages)
        panel = content.panel - work.first_panel
        expert = experts[content.group]

        @pl.when(panel >= loaded)
        def load_panel() -> None:
            _load_panel(config, content, panel, x, rows, shared)

        @pl.when(index >= stages)
        def reuse() -> None:
            plgpu.barrier_wait(shared.stage_empty.at[stage])

        item = tiling.stage_words // tiling.stage_items
        for count in range(1, 1 + tiling.stage_items):

            @pl.when(content.count == count)
            def load_items(size=count * item) -> None:
                plgpu.copy_gmem_to_smem(
                    words.at[expert, content.k_split, content.stage, pl.ds(content.start * item, size)],
                    shared.weights.at[stage, pl.ds(0, size)],
                    shared.stage_full.at[stage],
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

        return jnp.maximum(loaded, panel + 1)

    jax.lax.fori_loop(0, work.stages, load, jnp.int32(0))

    def drain(index: jax.Array, _: None) -> None:
        plgpu.barrier_wait(shared.stage_empty.at[jax.lax.rem(index, stages)])

    jax.lax.fori_loop(jnp.maximum(work.stages - stages, 0), work.stages, drain, None)

    def drain_panel(panel: jax.Array, _: None) -> None:
        plgpu.barrier_wait(shared.buffer_empty.at[jax.lax.rem(panel, config.buffers)])

    if config.are_buffers_reused:
        jax.lax.fori_loop(jnp.maximum(work.panels - config.buffers, 0), work.panels, drain_panel, None)


def _load_panel(config: KernelConfig, content: StageContent, panel, x, rows, shared: _Shared) -> None:
    """Gathers the columns of a group, each of which arrives at the buffer's barrier."""
    buffer = jax.lax.rem(panel, config.buffers)
    # All rows are read before the first copy, or each copy would wait for a read of its own.
    found = [rows[content.group * config.columns + column] for column in range(config.columns)]

    if config.are_buffers_reused:

        @pl.when(panel >= config.buffers)
        def reuse() -> None:
            plgpu.barrier_wait(shared.buffer_empty.at[buffer])

    for column, row in enumerate(found):
        plgpu.copy_gmem_to_smem(
            x.at[row, content.k_split],
            shared.activations.at[buffer, column, pl.ds(0, config.tiling.panel_cols)],
            shared.buffer_full.at[buffer],
            oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )


def _consume(config: KernelConfig, work: SmWork, warpgroup, pairs, out, shared: _Shared) -> None:
    """Every fourth stage of the work, in order."""
    multiply_stage = mosaic_tile.multiply_stage if config.interpret is None else mosaic_plain.multiply_stage

    def enter(panel: jax.Array, _: None = None) -> None:
        """Leaves the panel before, and waits for this one; past the last there is nothing to wait for."""

        @pl.when(panel > 0)
        def leave() -> None:
            plgpu.barrier_arrive(shared.buffer_empty.at[jax.lax.rem(panel - 1, config.buffers)])

        @pl.when(panel < work.panels)
        def wait() -> None:
            plgpu.barrier_wait(shared.buffer_full.at[jax.lax.rem(panel, config.buffers)])

    def multiply(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        stage, awaited = carry
        content = work.content(turn * config.consumers + warpgroup)
        panel = content.panel - work.first_panel
        if config.are_buffers_reused:
            jax.lax.fori_loop(awaited, panel + 1, enter, None)  # also those without a stage for this warpgroup
        else:

            @pl.when(panel >= awaited)
            def new_panel() -> None:
                plgpu.barrier_wait(shared.buffer_full.at[panel])

        plgpu.barrier_wait(shared.stage_full.at[stage])
        scalars = {name: getattr(content, name) for name in mosaic_tile.SCALARS}
        buffer = shared.activations.at[jax.lax.rem(panel, config.buffers)]
        refs = (shared.weights.at[stage], buffer, shared.sums.at[warpgroup], pairs, out)
        multiply_stage(config.tiling, config.columns, refs, scalars)
        plgpu.commit_smem()  # the next copy into the stage goes through another proxy than these reads
        plgpu.barrier_arrive(shared.stage_empty.at[stage])
        following = stage + config.consumers
        return jnp.where(following >= config.stages, warpgroup, following), panel + 1

    turns = jax.lax.div(work.stages - warpgroup + config.consumers - 1, config.consumers)
    _, awaited = jax.lax.fori_loop(0, turns, multiply, (warpgroup, jnp.int32(0)))
    if config.are_buffers_reused:
        jax.lax.fori_loop(awaited, work.panels + 1, enter, None)
