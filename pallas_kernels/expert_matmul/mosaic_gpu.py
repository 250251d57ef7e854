"""The experts on Hopper: one persistent kernel for gate and up, one for down; packed weights go straight to registers.

Every processor takes an equal, contiguous part of a list of (group, tile) that the routing decides; a group is an
expert with up to 16 columns of activations. One warp keeps a ring of slots in shared memory full by bulk copies; four
warpgroups take the slots in turn (`mosaic_tile`). What a slot needs of the activations is a page, and pages have a
ring of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import on_hopper
from pallas_kernels.expert_matmul import mosaic_plain, mosaic_tile, reference
from pallas_kernels.expert_matmul.layout import (
    ROWS,
    WARPS,
    PackedExperts,
    TiledExperts,
    Tiling,
    down_tiling,
    gate_up_tiling,
)
from pallas_kernels.expert_matmul.schedule import Shares, sorted_work_list, work_list

CONSUMERS = 4  # warpgroups that compute: four warps for each of the four schedulers of a processor
SHARED_MEMORY = 226 * 1024  # bytes that a Hopper processor gives one block, but for barriers
MOST_SLOTS = 16
MOST_PAGES = 2  # of a chunk, in shared memory; a page has more slots than the ring, so one of two is free in time
PROCESSORS = 132  # of an H100 or H200 (SXM)
MOST_PAIRS = 128  # of a block, for its list of work compares all with all
GROUP_COLUMNS = 16  # of a group when tokens are many
CHUNK_TOKENS = 256  # at a time, for the results of all pairs lie in memory before they are added up


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for."""

    shares: Shares
    columns: int  # 8 or 16
    pairs: int  # rows of the result
    pages: int  # that shared memory holds at a time
    consumers: int = CONSUMERS
    most_slots: int = MOST_SLOTS
    interpret: Any = None

    @property
    def cut(self) -> Tiling:
        return self.shares.cut

    @property
    def are_pages_reused(self) -> bool:
        return self.pages < self.shares.most_pages

    @property
    def page_shape(self) -> tuple[int, int]:
        return self.columns, self.cut.page_cols + mosaic_tile.PAGE_GAP

    @property
    def sums_shape(self) -> tuple[int, int]:
        return WARPS, self.columns * mosaic_tile.SUM_STRIDE

    @property
    def slots(self) -> int:
        """Slots of the ring: what fits beside the pages, a multiple of the consumers, each of which has its own."""
        fitting = (SHARED_MEMORY - self._fixed_bytes) // (4 * self.cut.slot_words)
        return min(fitting, self.most_slots) // self.consumers * self.consumers

    @property
    def shared_bytes(self) -> int:
        """Of shared memory."""
        return self._fixed_bytes + 4 * self.cut.slot_words * self.slots

    @property
    def _fixed_bytes(self) -> int:
        pages = 2 * self.pages * self.page_shape[0] * self.page_shape[1]
        return pages + 4 * self.consumers * self.sums_shape[0] * self.sums_shape[1]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the kernels run on; the interpreter takes fewer and smaller of everything."""

    processors: int = PROCESSORS
    consumers: int = CONSUMERS
    most_slots: int = MOST_SLOTS
    interpret: Any = None

    def plan(self, cut: Tiling, tokens: int, chosen: int, num_experts: int) -> Plan:
        """For so many tokens at once, each of which chooses some of so many experts."""
        pairs, is_block = tokens * chosen, tokens <= reference.DECODE_TOKENS
        columns = -(-tokens // mosaic_tile.COLUMNS) * mosaic_tile.COLUMNS if is_block else GROUP_COLUMNS
        groups = pairs if is_block else reference.most_blocks(pairs, num_experts, columns)
        shares = Shares(cut, self.processors, groups, is_block and cut.by_columns)
        pages = shares.most_pages if is_block else min(shares.most_pages, MOST_PAGES)
        return Plan(shares, columns, pairs, pages, self.consumers, self.most_slots, self.interpret)


HOPPER = Machine()


def unsupported(x_TD: Array, ids_TX: Array, experts: PackedExperts | TiledExperts) -> str | None:
    """What keeps this backend from serving a call."""
    if not on_hopper():
        return f"JAX's default device is {jax.devices()[0].device_kind!r}, not an NVIDIA GPU of compute capability 9.0"
    if isinstance(experts, PackedExperts):
        return "the experts are in the published layout; `layout.tile_experts` turns them into tiles, once, at load"
    if x_TD.dtype != jnp.bfloat16:
        return f"tokens of dtype {x_TD.dtype}, not bfloat16"
    if x_TD.shape[0] <= reference.DECODE_TOKENS and ids_TX.size > MOST_PAIRS:
        return f"{ids_TX.size} (token, expert) pairs in a block of {x_TD.shape[0]}, more than {MOST_PAIRS}"
    _, hidden, features = experts.sizes
    tokens, chosen = ids_TX.shape
    for cut in (gate_up_tiling(hidden, features), down_tiling(hidden, features)):
        if HOPPER.plan(cut, min(tokens, CHUNK_TOKENS), chosen, experts.sizes[0]).slots < CONSUMERS:
            return f"experts of {hidden} x {features}, whose tiles and activations do not fit into shared memory"
    return None


def expert_ffn(
    x_TD: Float[Array, "T D"],
    ids_TX: Int[Array, "T X"],
    weights_TX: Float[Array, "T X"],
    experts: TiledExperts,
    first: int,
    num_experts: int,
    machine: Machine = HOPPER,
) -> Float[Array, "T D"]:
    """`api.expert_ffn` on rows `first` and following of the stacks."""
    tokens, chosen = ids_TX.shape
    if tokens > CHUNK_TOKENS:
        return _by_chunks(x_TD, ids_TX, weights_TX, experts, first, num_experts, machine)
    _, hidden, features = experts.sizes
    plan = machine.plan(gate_up_tiling(hidden, features), tokens, chosen, num_experts)
    list_work = work_list if tokens <= reference.DECODE_TOKENS else sorted_work_list
    work = list_work(ids_TX, num_experts, plan.columns)
    tables = (work.experts + first, work.pairs.reshape(-1), work.count)
    sums_PGR = matmul(plan, x_TD, work.tokens.reshape(-1), experts.gate_up, *tables)
    hidden_PF = _activate(sums_PGR).astype(x_TD.dtype)

    plan = machine.plan(down_tiling(hidden, features), tokens, chosen, num_experts)
    sums_PGD = matmul(plan, hidden_PF, jnp.maximum(work.pairs, 0).reshape(-1), experts.down, *tables)
    return _combine(_total(sums_PGD), work.own_pair, weights_TX)


def _by_chunks(x_TD: Array, ids_TX: Array, weights_TX: Array, experts, first, num_experts, machine) -> Array:
    """One chunk of tokens after the other, of equal lengths."""
    tokens = x_TD.shape[0]
    chunks = -(-tokens // CHUNK_TOKENS)
    length = -(-tokens // chunks)

    def cut(rows: Array, value: int) -> Array:
        padded = jnp.pad(rows, ((0, chunks * length - tokens), (0, 0)), constant_values=value)
        return padded.reshape(chunks, length, -1)

    def run(chunk: tuple[Array, Array, Array]) -> Array:
        x, ids, weights = chunk
        return expert_ffn(x, ids, weights, experts, first, num_experts, machine)

    y_CTD = jax.lax.map(run, (cut(x_TD, 0), cut(ids_TX, num_experts), cut(weights_TX, 0)))
    return y_CTD.reshape(-1, x_TD.shape[1])[:tokens]


def _total(sums_PGR: Array) -> Array:
    """The granules' sum in their order, whatever a compiler thinks of sums."""
    total_PR = sums_PGR[:, 0]
    for granule in range(1, sums_PGR.shape[1]):
        total_PR = total_PR + sums_PGR[:, granule]
    return total_PR


def _activate(sums_PGR: Array) -> Array:
    """silu(gate) * up, whose rows alternate by eights."""
    total_PR = _total(sums_PGR)
    halves = total_PR.reshape(total_PR.shape[0], -1, 2, ROWS // 2)
    gate, up = (halves[:, :, which].reshape(total_PR.shape[0], -1) for which in (0, 1))
    return jax.nn.silu(gate) * up


def _combine(y_PD: Array, own_TX: Array, weights_TX: Array) -> Array:
    y_TD = jnp.zeros((own_TX.shape[0], y_PD.shape[1]), jnp.float32)
    for choice in range(own_TX.shape[1]):
        own_T, weight_T = own_TX[:, choice], weights_TX[:, choice].astype(jnp.float32)
        part_TD = y_PD[jnp.maximum(own_T, 0)] * weight_T[:, None]
        y_TD = y_TD + jnp.where((own_T >= 0)[:, None], part_TD, 0)
    return y_TD


@functools.partial(jax.jit, static_argnums=0)  # so that all layers of a program share one lowered kernel
def matmul(
    plan: Plan,
    x_RK: Float[Array, "R K"],
    rows_C: Int[Array, "C"],
    words: Int[Array, "S granules slots words"],
    experts_G: Int[Array, "G"],
    pairs_C: Int[Array, "C"],
    count: Int[Array, "1"],
) -> Float[Array, "P granules rows"]:
    """The products of each group's expert with its columns, one row per pair.

    C runs over the columns of all groups: `rows_C` says which row of `x_RK` a column is, `pairs_C` which pair it is for
    (-1: none). `count` groups exist. Rows of pairs that do not occur stay undefined.
    """
    cut = plan.cut
    kernel = plgpu.kernel(
        functools.partial(_body, plan),
        out_type=jax.ShapeDtypeStruct((plan.pairs, cut.granules, cut.rows), jnp.float32),
        grid=(plan.shares.processors,),
        grid_names=("processor",),
        num_threads=plan.consumers + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            ring=plgpu.SMEM((plan.slots, cut.slot_words), jnp.int32),
            held=plgpu.SMEM((plan.pages, *plan.page_shape), jnp.bfloat16),
            sums=plgpu.SMEM((plan.consumers, *plan.sums_shape), jnp.float32),
            full=plgpu.Barrier(num_barriers=plan.slots),
            empty=plgpu.Barrier(num_barriers=plan.slots),
            page_full=plgpu.Barrier(num_arrivals=plan.columns, num_barriers=plan.pages),
            page_empty=plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=plan.pages),
        ),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=plan.interpret,
    )
    x_RGK = x_RK.reshape(x_RK.shape[0], cut.granules, cut.page_cols)
    return kernel(x_RGK, rows_C, words, experts_G, pairs_C, count)


def _body(plan: Plan, x, rows, words, experts, pairs, count, out, *, ring, held, sums, **barriers) -> None:
    share = plan.shares.of(jax.lax.axis_index("processor"), count[0])
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == plan.consumers)
    def produce() -> None:
        _on_one_warp(plan, lambda: _produce(plan, share, x, rows, words, experts, ring, held, **barriers))

    @pl.when(warpgroup < plan.consumers)
    def consume() -> None:
        _consume(plan, share, warpgroup, pairs, out, ring, held, sums, **barriers)


def _on_one_warp(plan: Plan, work: Callable[[], None]) -> None:
    if plan.interpret is not None:
        work()  # the interpreter knows whole warpgroups only
        return

    plgpu.warp_map(lambda warp: pl.when(warp == 0)(work))


def _produce(plan: Plan, share, x, rows, words, experts, ring, held, full, empty, page_full, page_empty) -> None:
    """Fills the ring, and the page buffers as the slots come to need them."""
    cut, slots = plan.cut, plan.slots

    def load(index: jax.Array, loaded: jax.Array) -> jax.Array:
        place = share.place(index)
        slot = jax.lax.rem(index, slots)
        page = place.page - share.first_page
        expert = experts[place.group]

        @pl.when(page >= loaded)
        def load_page() -> None:
            _load_page(plan, place, page, x, rows, held, page_full, page_empty)

        @pl.when(index >= slots)
        def reuse() -> None:
            plgpu.barrier_wait(empty.at[slot])

        unit = cut.slot_words // cut.units
        for count in range(1, 1 + cut.units):

            @pl.when(place.count == count)
            def load_units(size=count * unit) -> None:
                plgpu.copy_gmem_to_smem(
                    words.at[expert, place.granule, place.slot, pl.ds(place.start * unit, size)],
                    ring.at[slot, pl.ds(0, size)],
                    full.at[slot],
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

        return jnp.maximum(loaded, page + 1)

    jax.lax.fori_loop(0, share.slots, load, jnp.int32(0))

    def drain(index: jax.Array, _: None) -> None:
        plgpu.barrier_wait(empty.at[jax.lax.rem(index, slots)])

    jax.lax.fori_loop(jnp.maximum(share.slots - slots, 0), share.slots, drain, None)

    def drain_page(page: jax.Array, _: None) -> None:
        plgpu.barrier_wait(page_empty.at[jax.lax.rem(page, plan.pages)])

    if plan.are_pages_reused:
        jax.lax.fori_loop(jnp.maximum(share.pages - plan.pages, 0), share.pages, drain_page, None)


def _load_page(plan: Plan, place, page, x, rows, held, page_full, page_empty) -> None:
    """Gathers the columns of a group, each of which arrives at the page's barrier."""
    buffer = jax.lax.rem(page, plan.pages)
    # All rows are read before the first copy, or each copy would wait for a read of its own.
    found = [rows[place.group * plan.columns + column] for column in range(plan.columns)]

    if plan.are_pages_reused:

        @pl.when(page >= plan.pages)
        def reuse() -> None:
            plgpu.barrier_wait(page_empty.at[buffer])

    for column, row in enumerate(found):
        plgpu.copy_gmem_to_smem(
            x.at[row, place.granule],
            held.at[buffer, column, pl.ds(0, plan.cut.page_cols)],
            page_full.at[buffer],
            oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )


def _consume(plan: Plan, share, warpgroup, pairs, out, ring, held, sums, full, empty, page_full, page_empty) -> None:
    """Every fourth slot of the part, in order."""
    unit = mosaic_tile.unit if plan.interpret is None else mosaic_plain.unit

    def enter(page: jax.Array, _: None = None) -> None:
        """Leaves the page before, and waits for this one; past the last there is nothing to wait for."""

        @pl.when(page > 0)
        def leave() -> None:
            plgpu.barrier_arrive(page_empty.at[jax.lax.rem(page - 1, plan.pages)])

        @pl.when(page < share.pages)
        def wait() -> None:
            plgpu.barrier_wait(page_full.at[jax.lax.rem(page, plan.pages)])

    def multiply(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slot, awaited = carry
        place = share.place(turn * plan.consumers + warpgroup)
        page = place.page - share.first_page
        if plan.are_pages_reused:
            jax.lax.fori_loop(awaited, page + 1, enter, None)  # also those without a slot for this warpgroup
        else:

            @pl.when(page >= awaited)
            def new_page() -> None:
                plgpu.barrier_wait(page_full.at[page])

        plgpu.barrier_wait(full.at[slot])
        scalars = {name: getattr(place, name) for name in mosaic_tile.SCALARS}
        refs = (ring.at[slot], held.at[jax.lax.rem(page, plan.pages)], sums.at[warpgroup], pairs, out)
        unit(plan.cut, plan.columns, refs, scalars)
        plgpu.commit_smem()  # the next copy into the slot goes through another proxy than these reads
        plgpu.barrier_arrive(empty.at[slot])
        following = slot + plan.consumers
        return jnp.where(following >= plan.slots, warpgroup, following), page + 1

    turns = jax.lax.div(share.slots - warpgroup + plan.consumers - 1, plan.consumers)
    _, awaited = jax.lax.fori_loop(0, turns, multiply, (warpgroup, jnp.int32(0)))
    if plan.are_pages_reused:
        jax.lax.fori_loop(awaited, share.pages + 1, enter, None)
