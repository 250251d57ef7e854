"""Counters by which CTAs and devices wait for each other, in an ordinary int32 array.

A counter only grows and outlives the launch: nothing is ever zeroed. A target is `epoch * per_round + value`, where a
round adds `per_round` to the counter; differences are signed, so that wrapping around is harmless.

What must be fenced, between a write and a read by another CTA (PTX ISA, "Asynchronous operations" and "Proxies"):

| written by        | read by     | the writer's signal            | the reader's wait       |
|-------------------|-------------|--------------------------------|-------------------------|
| stores            | loads       | release                        | acquire                 |
| stores            | bulk copies | proxy fence, release           | acquire, proxy fence    |
| bulk copies       | loads       | completion of copies, release  | acquire                 |
| bulk copies       | bulk copies | completion of copies, release  | acquire, proxy fence    |

A signal does not know its readers: it always has the fence of its writes. That of stores is for shared memory as well,
where pages that a row has stored into are next filled by copies.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.decode_step.hopper.config import CONSUMERS
from pallas_kernels.lanes import WARP, WARPGROUP

Scope = Literal["gpu", "sys"]
FAULT = ("stuck", "cta", "role", "row", "counter", "seen", "wanted")  # the words of a report
POLLS_PER_CHECK = 1024  # of the clock, and of whether another wait has given up
CONSUMERS_BARRIER = 15  # Mosaic counts its named barriers upward from 0, one for each warpgroup
SPLAT = plgpu.Layout.WG_SPLAT(())


def given_up(fault: Any) -> str | None:
    """Which wait took too long, as a launch has reported it; None if none did."""
    report = dict(zip(FAULT, np.asarray(fault).tolist()))
    return f"a wait took too long: {report}" if report["stuck"] else None


class Unit(enum.Enum):
    """Who signals or waits together; its first thread acts for all."""

    WARP = WARP
    WARPGROUP = WARPGROUP
    CONSUMERS = CONSUMERS * WARPGROUP


def target(epoch: Any, per_round: Any, value: Any) -> Any:
    """Of a counter in a round: `value` is what it must have gained since the round began."""
    return epoch * per_round + value


@dataclasses.dataclass(frozen=True)
class GpuCounters:
    """As machine code.

    `counts` is int32 [counters] and `fault` int32 [len(FAULT)], zero before the launch; both are refs in global memory.
    A wait of more than `limit_ns` nanoseconds reports itself in `fault`, if it is the first, and lets all waits pass:
    the launch ends, with results that are worthless.
    """

    counts: Any
    fault: Any
    cta: Any
    role: int = 0
    unit: Unit = Unit.CONSUMERS
    limit_ns: int = 2_000_000_000

    def by(self, unit: Unit, role: int) -> GpuCounters:
        return dataclasses.replace(self, unit=unit, role=role)

    def signal(
        self,
        counter: Any,
        amount: int = 1,
        peers: Sequence[Any] | None = None,
        wrote: Literal["stores", "copies"] = "stores",
    ) -> None:
        """Whoever sees the counter move sees what the unit wrote before. With `peers`, device numbers, theirs move."""
        peers = list(peers or [])

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, [SPLAT] * len(peers)))
        def inline(context, counts, counter, peers):
            _asm("fence.proxy.async;" if wrote == "stores" else "cp.async.bulk.wait_group 0;")
            _barrier(self.unit)
            counts = [context.to_remote(counts, _scalar(peer)) for peer in peers] or [counts]
            with _first_thread(self.unit):
                if peers:  # one fence for all, which makes each of the relaxed additions a release
                    _asm("fence.acq_rel.sys;")
                order = "relaxed.sys" if peers else "release.gpu"
                for ref in counts:
                    _asm(f"red.{order}.global.add.u32 [$0], $1;", [_at(ref, _scalar(counter)), _i32(amount)], "l,r")

        inline(self.counts, counter, peers)

    def wait(
        self,
        counter: Any,
        wanted: Any,
        row: Any = 0,
        scope: Scope = "gpu",
        reads: Literal["loads", "copies"] = "loads",
    ) -> None:
        """Until the counter has reached what is wanted. `scope` is "sys" if peers signal it; `row` is for a report."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), (SPLAT,) * 4))
        def inline(_, counts, fault, scalars):
            counter, wanted, row, cta = map(_scalar, scalars)
            with _first_thread(self.unit):
                watchdog = _Watchdog(fault, (cta, _i32(self.role), row, counter), wanted, self.limit_ns)
                _poll(_at(counts, counter), wanted, scope, watchdog)
                if reads == "copies":
                    _asm("fence.proxy.async.global;")
            _barrier(self.unit)

        inline(self.counts, self.fault, (counter, wanted, row, self.cta))


@dataclasses.dataclass(frozen=True)
class _Watchdog:
    fault: Any
    place: tuple[Any, ...]
    wanted: Any
    limit_ns: int

    def gives_up(self, started: Any, seen: Any) -> Any:
        """Whether this wait, or another before it, has taken too long; as a bit."""
        waited = arith.subi(_now(), started)
        is_late = arith.cmpi(arith.CmpIPredicate.ugt, waited, _i64(self.limit_ns))
        with utils.when(is_late):
            self.report(seen)
        stuck = _asm("ld.relaxed.gpu.global.b32 $0, [$1];", [_at(self.fault, _i32(0))], "=r,l", _int(32))
        return arith.cmpi(arith.CmpIPredicate.ne, stuck, _i32(0))

    def report(self, seen: Any) -> None:
        stuck = _at(self.fault, _i32(0))
        before = _asm("atom.relaxed.gpu.global.exch.b32 $0, [$1], 1;", [stuck], "=r,l", _int(32))
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, before, _i32(0))):
            for word, value in enumerate((*self.place, seen, self.wanted), 1):
                llvm.store(value, _at(self.fault, _i32(word)), alignment=4)


def _poll(address: Any, wanted: Any, scope: Scope, watchdog: _Watchdog) -> None:
    """One thread's loop: neither clock nor flag is looked at before it has failed many times."""
    before, after = [_int(32), _int(64), _int(1)], [_int(32), _int(64), _int(32)]
    loop = scf.WhileOp(after, [_i32(0), _i64(0), _bit(False)])
    polls, started, has_given_up = loop.before.blocks.append(*before).arguments
    with ir.InsertionPoint(loop.before.blocks[0]):
        seen = _asm(f"ld.acquire.{scope}.global.b32 $0, [$1];", [address], "=r,l", _int(32))
        is_behind = arith.cmpi(arith.CmpIPredicate.slt, arith.subi(seen, wanted), _i32(0))
        goes_on = arith.andi(is_behind, arith.xori(has_given_up, _bit(True)))
        scf.condition(goes_on, [arith.addi(polls, _i32(1)), started, seen])
    polls, started, seen = loop.after.blocks.append(*after).arguments
    with ir.InsertionPoint(loop.after.blocks[0]):
        is_due = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(polls, _i32(POLLS_PER_CHECK)), _i32(0))
        check = scf.IfOp(is_due, [_int(64), _int(1)], has_else=True)
        with ir.InsertionPoint(check.then_block):
            is_first = arith.cmpi(arith.CmpIPredicate.eq, started, _i64(0))
            started_at = arith.select(is_first, _now(), started)
            scf.yield_([started_at, watchdog.gives_up(started_at, seen)])
        otherwise: Any = check.else_block
        with ir.InsertionPoint(otherwise):
            scf.yield_([started, _bit(False)])
        scf.yield_([polls, *check.results])


def meet() -> None:
    """All consumers of the CTA have come so far, and see what the others have stored."""
    plgpu.inline_mgpu()(lambda _: _barrier(Unit.CONSUMERS))()


def prefetch(source: Any, count: Any) -> None:
    """Into the L2 cache, by one thread of a warp: `count` times a contiguous ref of whole 16 bytes, at such a place."""
    size = 4 * math.prod(source.shape)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def inline(_, source, count):
        with _first_thread(Unit.WARP):
            nbytes = arith.muli(_scalar(count), _i32(size))
            _asm("cp.async.bulk.prefetch.L2.global [$0], $1;", [utils.memref_ptr(source), nbytes], "l,r")

    inline(source, count)


def add_one(place: Any) -> None:
    """To an int32 in global memory; by the first of all consumers."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def inline(_, place):
        with _first_thread(Unit.CONSUMERS):
            _asm("red.relaxed.gpu.global.add.u32 [$0], 1;", [utils.memref_ptr(place)], "l")

    inline(place)


def bring(row: Any, place: Any, unit: Unit) -> None:
    """Begins to copy a row of the table, four times 16 bytes, into shared memory; `brought` ends it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def inline(_, row, place):
        thread = arith.remui(_asm("mov.u32 $0, %tid.x;", (), "=r", _int(32)), _i32(unit.value))
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, _i32(4))):
            first = arith.muli(thread, _i32(4))
            address = llvm.ptrtoint(_int(32), _at(place, first))
            _asm("cp.async.cg.shared.global [$0], [$1], 16;", [address, _at(row, first)], "r,l")

    inline(row, place)


def brought(unit: Unit) -> None:
    """What the unit has begun to copy is there, for all of its threads."""

    @plgpu.inline_mgpu()
    def inline(_):
        _asm("cp.async.wait_all;")
        _barrier(unit)

    inline()


def stamp(place: Any, unit: Unit) -> None:
    """Stores the time, nanoseconds mod 2**32, into an int32 in global memory; by the unit's first thread."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def inline(_, place):
        with _first_thread(unit):
            now = _asm("mov.u32 $0, %globaltimer_lo;", (), "=r", _int(32))
            llvm.store(now, utils.memref_ptr(place), alignment=4)

    inline(place)


def _barrier(unit: Unit) -> None:
    if unit == Unit.CONSUMERS:
        _asm(f"bar.sync {CONSUMERS_BARRIER}, {unit.value};")
    elif unit == Unit.WARPGROUP:
        utils.warpgroup_barrier()
    else:
        utils.warp_barrier()


@contextmanager
def _first_thread(unit: Unit) -> Iterator[None]:
    """The consumers have the block's first threads. The number is asked for anew, lest a register keep it for ever."""
    thread = _asm("mov.u32 $0, %tid.x;", (), "=r", _int(32))
    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, arith.remui(thread, _i32(unit.value)), _i32(0))):
        yield


def _asm(text: str, operands: Sequence[Any] = (), constraints: str = "", result: Any = None) -> Any:
    kind = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(kind, list(operands), text, constraints, has_side_effects=True)


def _now() -> Any:
    """Nanoseconds."""
    return utils.globaltimer()


def _int(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


def _i32(number: int) -> Any:
    return utils.c(number, _int(32))


def _i64(number: int) -> Any:
    return utils.c(number, _int(64))


def _bit(value: bool) -> Any:
    return utils.c(value, _int(1))


def _at(ref: Any, index: Any) -> Any:
    return utils.getelementptr(utils.memref_ptr(ref), [index], _int(32))


def _scalar(value: Any) -> Any:
    return value.registers.item()


@dataclasses.dataclass(frozen=True)
class InterpretedCounters:
    """The same for Pallas' interpreter, which has neither atomic operations nor remote refs.

    `counts` is int32 [devices, counters, writers]: each writer (a CTA of a device; one role of it per counter) has a
    word of its own. `meeting` is a barrier of all consumers; `is_first` says who acts for its unit. `pause` is called
    for each failed poll, with their number, and returns it plus one.
    """

    counts: Any
    device: Any
    writer: Any
    meeting: Any
    is_first: Any = True
    unit: Unit = Unit.CONSUMERS
    pause: Callable[[Any], Any] = lambda polls: polls + 1

    def by(self, unit: Unit, role: int) -> InterpretedCounters:
        return dataclasses.replace(self, unit=unit, is_first=True)

    def signal(self, counter: Any, amount: int = 1, peers: Sequence[Any] | None = None, wrote: str = "stores") -> None:
        """See `GpuCounters`."""
        self._meet()

        @pl.when(self.is_first)
        def _():
            for peer in [self.device] if peers is None else peers:
                self.counts[peer, counter, self.writer] = self.counts[peer, counter, self.writer] + amount

    def wait(self, counter: Any, wanted: Any, row: Any = 0, scope: Scope = "gpu", reads: str = "loads") -> None:
        """See `GpuCounters`."""

        def is_behind(polls: Any) -> Any:  # which are looked at, or XLA would find that it can do without the pause
            return (self.counts[self.device, counter].sum() - wanted < 0) & (polls >= 0)

        @pl.when(self.is_first)
        def _():
            lax.while_loop(is_behind, self.pause, 0)

        self._meet()

    def _meet(self) -> None:
        if self.unit == Unit.CONSUMERS:
            plgpu.barrier_arrive(self.meeting)
            plgpu.barrier_wait(self.meeting)
