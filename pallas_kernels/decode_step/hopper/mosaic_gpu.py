"""The round as one Pallas kernel: a `Program` whose machine is a CTA of Hopper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.decode_step.assigned import ROLES
from pallas_kernels.decode_step.hopper import roles, sync
from pallas_kernels.decode_step.hopper.config import CONSUMERS, OWN_COLUMNS, SLOT_COPIES, SLOT_WORDS
from pallas_kernels.decode_step.hopper.copies import Filled
from pallas_kernels.decode_step.hopper.machine import STAMPS, Buffers, Shared, Weights
from pallas_kernels.decode_step.hopper.plan import PAGE_PARTS, StepPlan
from pallas_kernels.decode_step.hopper.program import Program
from pallas_kernels.decode_step.hopper.roles import Queue, Ring, Row
from pallas_kernels.decode_step.hopper.routing import list_scratch
from pallas_kernels.decode_step.hopper.sync import Unit
from pallas_kernels.decode_step.hopper.table import EPOCH
from pallas_kernels.lanes import emitted

MESH_AXIS = "tensor"
COUNTS = 2  # where each role has the first counters, behind two rows
IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS


class Mosaic:
    """See `program.Machine`."""

    def __init__(self, plan: StepPlan) -> None:
        self.devices = plan.devices
        self.cta = lax.axis_index("cta")
        self.rank: Any = lax.axis_index(MESH_AXIS) if plan.devices > 1 else jnp.int32(0)
        # In order from the own one on, so that devices do not all send to the same.
        self.peers: Any = [lax.rem(self.rank + peer, plan.devices) for peer in range(plan.devices)]

    def call(self, tile: Callable, refs: Sequence[Any], scalars: dict[str, Any], state: Any = None) -> Any:
        return emitted.call(tile, refs, {name: jnp.int32(value) for name, value in scalars.items()}, state)

    def first_state(self, numbers: Sequence[float]) -> Any:
        return emitted.state_of(numbers)

    def loop(self, first: Any, last: Any, body: Callable[[Any, Any], Any], carry: Any = None) -> Any:
        carry = jax.tree.map(lambda leaf: jnp.int32(leaf) if isinstance(leaf, int) else leaf, carry)
        if isinstance(last, int):  # else the compiler writes short loops out
            last = emitted.opaque(last)
        return lax.fori_loop(jnp.int32(first), jnp.int32(last), body, carry)

    def when(self, condition: Any, run: Callable[[], None]) -> None:
        pl.when(condition)(run)

    def integer(self, condition: Any) -> Any:
        return jnp.int32(condition)

    def div(self, a: Any, b: Any) -> Any:
        return lax.div(jnp.int32(a), jnp.int32(b))

    def rem(self, a: Any, b: Any) -> Any:
        return lax.rem(jnp.int32(a), jnp.int32(b))

    def smaller(self, a: Any, b: Any) -> Any:
        return jnp.minimum(a, b)

    def part(self, ref: Any, first: Any, size: int) -> Any:
        return ref.at[pl.ds(first, size)]

    def copy(self, source: Any, place: Any, barrier: Any) -> None:
        plgpu.copy_gmem_to_smem(source, place, barrier, oob_mode=IN_BOUNDS)

    def prefetch(self, source: Any, count: Any = 1) -> None:
        sync.prefetch(source, jnp.int32(count))

    def push(self, source: Any, ref: Any, first: Any, size: int) -> None:
        for peer in self.peers:
            plgpu.copy_smem_to_gmem(source, plgpu.remote_ref(ref, peer).at[pl.ds(first, size)])

    def meet(self) -> None:
        sync.meet()

    def arrive(self, barrier: Any) -> None:
        plgpu.commit_smem()
        plgpu.barrier_arrive(barrier)

    def arrive_alone(self, barrier: Any) -> None:
        plgpu.barrier_arrive(barrier)

    def wait(self, barrier: Any) -> None:
        plgpu.barrier_wait(barrier)

    def count_round(self, counts: Any, place: int) -> None:
        sync.add_one(counts.at[place])


def launch(
    plan: StepPlan,
    table: Int[Array, "ctas rows fields"],
    step: Int[Array, "4"],
    tokens: Int[Array, "8"],
    weights: Weights,
    buffers: Buffers,
) -> Buffers:
    """Rows [step[2], step[3]) of a round of `step[1]` tokens after `step[0]` others; buffers change in place.

    ValueError, naming field and value, if the kernel cannot serve the plan.
    """
    if reason := plan.unsupported():
        raise ValueError(f"the persistent kernel cannot serve this: {reason}")
    leaves, tree = jax.tree.flatten(buffers)
    refs = [jax.new_ref(leaf) for leaf in leaves]
    inputs, inputs_tree = jax.tree.flatten((table, step, tokens, weights))

    def body(*found: Any) -> None:
        table, step, tokens, weights = inputs_tree.unflatten(found[: len(inputs)])
        held = tree.unflatten(found[len(inputs) :])

        def with_scratch(shared: Shared, ring: tuple, pages: tuple, rows: Any) -> None:
            machine = Mosaic(plan)
            slots, full, empty = ring
            ring_, pages_ = Ring(full, empty, plan.slots, slots), Queue(pages[0], pages[1], PAGE_PARTS)
            _run(Program(plan, machine, step, tokens, weights, held, shared, ring_, pages_), table, rows)

        pl.run_scoped(with_scratch, *scratch(plan), collective_axes=roles.THREAD_AXIS)

    mesh = plgpu.Mesh(
        grid=(plan.ctas,),
        grid_names=("cta",),
        num_threads=roles.threads_of(CONSUMERS, len(ROLES) - 1, True),
        thread_name=roles.THREAD_AXIS,
    )
    options = plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    pl.kernel(body, out_type=(), mesh=mesh, compiler_params=options)(*inputs, *refs)
    return tree.unflatten([ref[...] for ref in refs])


def scratch(plan: StepPlan) -> tuple[Shared, tuple, tuple, Any]:
    """Shared memory, the ring, the pages; and for each role two rows of the table and the first counters."""
    t, columns = plan.target, plan.columns

    def words(shape: tuple[int, ...]) -> Any:
        return plgpu.SMEM(shape, jnp.int32)

    def floats(shape: tuple[int, ...]) -> Any:
        return plgpu.SMEM(shape, jnp.float32)

    shared = Shared(
        area=words((plan.area_words,)),
        x=floats((columns * OWN_COLUMNS,)),
        own=floats((columns * OWN_COLUMNS,)),
        factors=floats((columns,)),
        ids=words((plan.pairs,)),
        routes=floats((plan.pairs,)),
        lists=words((list_scratch(t.experts),)),
        active=words((plan.most_listed,)),
        count=words((1,)),
        pairs=words((plan.most_listed * columns,)),
        listed=plgpu.Barrier(),
        staged=plgpu.Barrier(num_arrivals=CONSUMERS),
    )
    full, empty = Ring.barriers(plan.slots, fills=SLOT_COPIES)
    pages = Queue.barriers(PAGE_PARTS, 1, CONSUMERS)
    return shared, (words((plan.slots, SLOT_WORDS)), full, empty), pages, words((len(ROLES), COUNTS + 1, roles.FIELDS))


def _run(program: Program, table: Any, rows: Any) -> None:
    counters = sync.GpuCounters(program.buffers.counts, program.buffers.fault, program.machine.cta)

    def epoch_of(name: str) -> Callable[[], Any]:
        """It changes when all CTAs have begun the last row (`pick_best`)."""
        return lambda: rows[ROLES.index(name), COUNTS, EPOCH]

    def walk(name: str, handlers: Any, carry: Any, wait: Any = None, signal: Any = None, begin: Any = None) -> Any:
        """A role's rows; if times are asked for, with a stamp before and after waits, and after all."""
        role, times = ROLES.index(name), program.buffers.times
        unit, last = Unit.CONSUMERS if name == "consume" else Unit.WARP, table.shape[1] - 1

        def bring(number: Any) -> None:
            place = rows.at[role, lax.rem(number, 2)]
            sync.bring(table.at[program.machine.cta, jnp.minimum(number, last)], place, unit)

        def stamp(row: Row, what: str) -> None:
            if times is not None:
                sync.stamp(times.at[program.machine.cta, row.number, role, STAMPS.index(what)], unit)

        def before(row: Row) -> None:
            bring(row.number + 1)
            stamp(row, "begun")
            if wait is not None:
                wait(row)
            stamp(row, "ready")
            if begin is not None:
                begin(row)

        def after(row: Row) -> None:
            if signal is not None:
                signal(row)
            stamp(row, "done")
            sync.brought(unit)

        bring(program.first)
        sync.bring(program.buffers.counts.at[pl.ds(0, roles.FIELDS)], rows.at[role, COUNTS], unit)
        sync.brought(unit)
        read = partial(roles.read_held, rows, role)
        return roles.walk(read, program.first, program.last, handlers, carry, before, after)

    def consume(team: Any) -> None:
        own = counters.by(Unit.CONSUMERS, ROLES.index("consume"))
        wait, signal = partial(program.await_row, own, epoch_of("consume")), partial(program.signal_row, own)
        program.resume(team)
        handlers, turns = program.consume(team), (jnp.int32(0), jnp.int32(0))
        walk("consume", handlers, turns, wait, signal, partial(program.begin_row, team))

    def weights() -> None:
        program.ring.drain(walk("weights", program.load(), Filled(jnp.int32(0), jnp.int32(0))).turn)

    def fetch() -> None:
        wait = partial(program.await_fetch, counters.by(Unit.WARP, ROLES.index("fetch")), epoch_of("fetch"))
        program.pages.drain(walk("fetch", program.fetch(), jnp.int32(0), wait))

    def send() -> None:
        walk("send", program.send(counters.by(Unit.WARP, ROLES.index("send"))), jnp.int32(0))

    roles.run(consume, [weights, fetch, send], CONSUMERS, as_warps=True)
