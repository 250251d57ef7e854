"""The experts on Hopper: one persistent kernel for gate and up, one for down; packed weights go straight to registers.

Every processor takes an equal, contiguous part of a list of (expert, tile) that the routing decides. One warp keeps a
ring of slots in shared memory full by bulk copies; four warpgroups take the slots in turn (`mosaic_tile`). What a slot
needs of the activations is a page; there are few pages in one processor's part, so two or three buffers do.
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

from pallas_kernels import mxfp4
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
from pallas_kernels.expert_matmul.schedule import Shares, work_list

CONSUMERS = 4  # warpgroups that compute: four warps for each of the four schedulers of a processor
SHARED_MEMORY = 226 * 1024  # bytes that a Hopper processor gives one block, but for barriers
MOST_SLOTS = 16
PROCESSORS = 132  # of an H100 or H200 (SXM)
MOST_PAIRS = 128  # that a block may have: one processor's part then sees two experts at most


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for."""

    shares: Shares
    tokens: int  # 8 or 16 columns
    consumers: int = CONSUMERS
    most_slots: int = MOST_SLOTS
    interpret: Any = None

    @property
    def cut(self) -> Tiling:
        return self.shares.cut

    @property
    def pairs(self) -> int:
        """Rows of the result, and at most so many groups."""
        return self.shares.most_groups

    @property
    def page_shape(self) -> tuple[int, int, int]:
        return self.cut.page_cols // mxfp4.BLOCK, self.tokens, mxfp4.BLOCK

    @property
    def sums_shape(self) -> tuple[int, int]:
        return WARPS, self.tokens * mosaic_tile.SUM_STRIDE

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
        pages = 2 * self.shares.most_pages * self.cut.page_cols * self.tokens
        return pages + 4 * self.consumers * self.sums_shape[0] * self.sums_shape[1]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the kernels run on; the interpreter takes fewer and smaller of everything."""

    processors: int = PROCESSORS
    consumers: int = CONSUMERS
    most_slots: int = MOST_SLOTS
    interpret: Any = None

    def plan(self, cut: Tiling, tokens: int, pairs: int) -> Plan:
        """For blocks of so many (padded) tokens and (token, expert) pairs."""
        return Plan(Shares(cut, self.processors, pairs), tokens, self.consumers, self.most_slots, self.interpret)


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
    for cut in (gate_up_tiling(hidden, features), down_tiling(hidden, features)):
        if HOPPER.plan(cut, reference.DECODE_TOKENS, MOST_PAIRS).slots < CONSUMERS:
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
    """`api.expert_ffn` on rows `first` and following of the stacks.

    More tokens than a block of decoding are a matter of arithmetic, not of bytes: those go through XLA's products, by
    experts, from the same tiles.
    """
    tokens = x_TD.shape[0]
    if tokens > reference.DECODE_TOKENS:
        return reference.expert_ffn(x_TD, ids_TX, weights_TX, experts, first, num_experts)
    _, hidden, features = experts.sizes
    columns = -(-tokens // mosaic_tile.COLUMNS) * mosaic_tile.COLUMNS
    work = work_list(ids_TX, num_experts, columns)
    tables = (work.experts + first, work.pairs.reshape(-1), work.count)

    plan = machine.plan(gate_up_tiling(hidden, features), columns, ids_TX.size)
    sums_PGR = matmul(plan, _shared_pages(plan, x_TD), experts.gate_up, *tables)
    hidden_PF = _activate(sums_PGR).astype(x_TD.dtype)

    plan = machine.plan(down_tiling(hidden, features), columns, ids_TX.size)
    sums_PGD = matmul(plan, _own_pages(plan, hidden_PF, work.pairs), experts.down, *tables)
    return _combine(_total(sums_PGD), work.own_pair, weights_TX)


def _shared_pages(plan: Plan, x_TD: Array) -> Array:
    """[granules, blocks of 32 columns, tokens, 32]."""
    x_ND = jnp.pad(x_TD, ((0, plan.tokens - x_TD.shape[0]), (0, 0)))
    pages = x_ND.reshape(plan.tokens, plan.cut.granules, -1, mxfp4.BLOCK)
    return jnp.transpose(pages, (1, 2, 0, 3))


def _own_pages(plan: Plan, hidden_PF: Array, pairs_GN: Array) -> Array:
    """[groups * granules, blocks of 32 columns, tokens, 32]; zeros where a token did not choose a group's expert."""
    hidden_GNF = jnp.where((pairs_GN >= 0)[..., None], hidden_PF[jnp.maximum(pairs_GN, 0)], 0)
    pages = hidden_GNF.reshape(plan.pairs, plan.tokens, plan.cut.granules, -1, mxfp4.BLOCK)
    return jnp.transpose(pages, (0, 2, 3, 1, 4)).reshape(-1, *plan.page_shape)


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


def matmul(plan: Plan, pages: jax.Array, words: jax.Array, experts: jax.Array, pairs: jax.Array, count: jax.Array):
    """The products of each group's expert with its tokens, one row per pair: float32 [pairs, granules, rows].

    pages: bf16 [pages, page_cols / 32, tokens, 32]; words: int32 [S, granules, slots, words]; experts: int32 [groups];
    pairs: int32 [groups * tokens]; count: int32 [1], groups that there are. Rows of pairs that do not occur stay
    undefined.
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
            held=plgpu.SMEM((plan.shares.most_pages, *plan.page_shape), jnp.bfloat16),
            sums=plgpu.SMEM((plan.consumers, *plan.sums_shape), jnp.float32),
            full=plgpu.Barrier(num_barriers=plan.slots),
            empty=plgpu.Barrier(num_barriers=plan.slots),
            page_full=plgpu.Barrier(num_barriers=plan.shares.most_pages),
        ),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=plan.interpret,
    )
    return kernel(pages, words, experts, pairs, count)


def _body(plan: Plan, pages, words, experts, pairs, count, out, *, ring, held, sums, full, empty, page_full) -> None:
    share = plan.shares.of(jax.lax.axis_index("processor"), count[0])
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == plan.consumers)
    def produce() -> None:
        _on_one_warp(plan, lambda: _produce(plan, share, pages, words, experts, ring, held, full, empty, page_full))

    @pl.when(warpgroup < plan.consumers)
    def consume() -> None:
        _consume(plan, share, warpgroup, pairs, out, ring, held, sums, full, empty, page_full)


def _on_one_warp(plan: Plan, work: Callable[[], None]) -> None:
    if plan.interpret is not None:
        work()  # the interpreter knows whole warpgroups only
        return

    plgpu.warp_map(lambda warp: pl.when(warp == 0)(work))


def _produce(plan: Plan, share, pages, words, experts, ring, held, full, empty, page_full) -> None:
    """Fills the ring, and the page buffers as the slots come to need them."""
    cut, slots = plan.cut, plan.slots

    def load(index: jax.Array, loaded: jax.Array) -> jax.Array:
        place = share.place(index)
        slot = jax.lax.rem(index, slots)
        page = place.page - share.first_page

        @pl.when(page >= loaded)
        def load_page() -> None:
            plgpu.copy_gmem_to_smem(
                pages.at[place.page], held.at[page], page_full.at[page], oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            )

        @pl.when(index >= slots)
        def reuse() -> None:
            plgpu.barrier_wait(empty.at[slot])

        expert = experts[place.group]
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


def _consume(plan: Plan, share, warpgroup, pairs, out, ring, held, sums, full, empty, page_full) -> None:
    """Every fourth slot of the part, in order."""
    unit = mosaic_tile.unit if plan.interpret is None else mosaic_plain.unit

    def multiply(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slot, awaited = carry
        place = share.place(turn * plan.consumers + warpgroup)
        page = place.page - share.first_page

        @pl.when(page >= awaited)
        def new_page() -> None:
            plgpu.barrier_wait(page_full.at[page])

        plgpu.barrier_wait(full.at[slot])
        scalars = {name: getattr(place, name) for name in mosaic_tile.SCALARS}
        refs = (ring.at[slot], held.at[page], sums.at[warpgroup], pairs, out)
        unit(plan.cut, plan.tokens, refs, scalars)
        plgpu.commit_smem()  # the next copy into the slot goes through another proxy than these reads
        plgpu.barrier_arrive(empty.at[slot])
        following = slot + plan.consumers
        return jnp.where(following >= plan.slots, warpgroup, following), page + 1

    turns = jax.lax.div(share.slots - warpgroup + plan.consumers - 1, plan.consumers)
    jax.lax.fori_loop(0, turns, multiply, (warpgroup, jnp.int32(0)))
