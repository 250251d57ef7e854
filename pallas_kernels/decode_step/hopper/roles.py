"""How a CTA works through its rows: all roles at once, each in a walk of its own, with shared memory between them.

Four consumer warpgroups ("teams") compute. Beside them three warps make copies: `weights` fills a ring and runs ahead
over rows, `fetch` brings into pages what other CTAs have made, `send` carries to all devices what the consumers staged.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_step.hopper.config import CONSUMERS

FIELDS = 16  # int32 of a row: half a cache line
NOTHING = 0  # the kind of rows of a CTA that has no share of a phase
NO_COUNTER = -1
THREAD_AXIS = "wg"
MAX_BARRIERS = 32  # of a `plgpu.Barrier`: a thread keeps their phases in one word
# A thread of five warpgroups begins with 96 registers, and nobody can take what nobody has given back.
LAUNCH_REGISTERS, CONSUMER_REGISTERS, ROLE_REGISTERS = 96, 112, 32

Turn = Any  # int32: so many places of a queue were used before


@dataclasses.dataclass(frozen=True)
class Row:
    """Of the table, in the order of its words; or as a kernel has read it.

    Its consumers or `fetch` wait until `wait` has gained `value` in this round. `per_round` is what that counter gains
    in a whole one (see `sync.target`).
    """

    kind: Any
    layer: Any = 0
    first: Any = 0  # share of the work
    last: Any = 0
    wait: Any = NO_COUNTER
    value: Any = 0
    per_round: Any = 0
    signal: Any = NO_COUNTER  # when the row is done
    arrived: Any = NO_COUNTER  # on every device, when what was sent is there
    parity: Any = 0  # of buffers with two places
    reader: Any = 0  # of a sum: the number in FORMATS of the weights that read it
    tap: Any = -1  # which of the auxiliary hidden states a sum is
    number: Any = 0  # in its list; not stored


STORED = [field.name for field in dataclasses.fields(Row)][:-1]


def encode(lists: Sequence[Sequence[Row]]) -> np.ndarray:
    """The lists of all CTAs, of the same length, as int32 [ctas, rows, FIELDS]."""
    table = np.zeros((len(lists), len(lists[0]), FIELDS), np.int32)
    for cta, rows in enumerate(lists):
        for number, row in enumerate(rows):
            table[cta, number, : len(STORED)] = [getattr(row, name) for name in STORED]
    return table


def read(table: Any, cta: Any, number: Any) -> Row:
    """Words one by one: Mosaic has no vectors as short as a row."""
    return Row(*(table[cta, number, word] for word in range(len(STORED))), number=number)


def read_held(rows: Any, role: int, number: Any) -> Row:
    """From shared memory [roles, places, FIELDS], for global memory is far: first a role's row and the next one."""
    return dataclasses.replace(read(rows, role, lax.rem(number, 2)), number=number)


def read_interpreted(table: Any, cta: Any, number: Any) -> Row:
    """All words at once: what the interpreter is asked for, not how much it is, takes its time."""
    words = table[cta, number]
    return Row(*(words[word] for word in range(len(STORED))), number=number)


def is_one_of(kind: Any, kinds: Sequence[int]) -> Any:
    return functools.reduce(operator.or_, [kind == one for one in kinds])


def walk(
    read: Callable[[Any], Row],
    first: Any,
    last: Any,
    handlers: Mapping[tuple[int, ...], Callable[[Row, Any], Any]],
    carry: Any,
    before: Callable[[Row], None] = lambda row: None,
    after: Callable[[Row], None] = lambda row: None,
) -> Any:
    """Rows [first, last) of a list, one after the other: `carry = handler(row, carry)`, whose handler is by the kind.

    `handlers` are by the kinds that share them; `before` and `after` are for rows of all kinds. `carry` is a tree of
    int32 scalars. Kinds without a handler are not this role's business.
    """

    def step(number: Any, carry: Any) -> Any:
        # A row is read wherever it is needed: so nobody keeps words of it that he does not ask for.
        before(read(number))
        own = read(number).kind
        for kinds, handler in handlers.items():
            is_own = is_one_of(own, kinds)
            # Not `lax.switch`, which does not lower for single warps. The false branch is lowered twice.
            carry = lax.cond(is_own, lambda carry: handler(read(number), carry), lambda carry: carry, carry)  # noqa: B023
        after(read(number))
        return carry

    return lax.fori_loop(first, last, step, carry)


def run(consume: Callable[[Any], None], roles: Sequence[Callable[[], None]], teams: int, as_warps: bool) -> None:
    """The body of a kernel of `threads_of` warpgroups: `consume(team)` in each team, and one warp for each role.

    In the interpreter roles are warpgroups.
    """
    thread = lax.axis_index(THREAD_AXIS)

    if as_warps:  # before the consumers, who else would have to keep what tells the warps apart

        @pl.when(thread == teams)
        def _():
            plgpu.set_max_registers(ROLE_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _(warp):
                for number, role in enumerate(roles):
                    pl.when(warp == number)(role)

    else:
        for number, role in enumerate(roles):
            pl.when(thread == teams + number)(role)

    @pl.when(thread < teams)
    def _():
        if as_warps:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consume(thread)


def threads_of(teams: int, roles: int, as_warps: bool) -> int:
    return teams + (1 if as_warps else roles)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Places in shared memory that pass from who fills them to who reads them: turn n takes place n % `places`."""

    full: Any  # barriers, as `barriers` makes them
    empty: Any
    places: int

    def place(self, turn: Turn) -> Any:
        return lax.rem(turn, self.places)

    def before_fill(self, turn: Turn) -> None:
        self._wait_until_free(turn)

    def freed(self, turn: Turn, stored: bool = False) -> None:
        """By everyone who has read the place, each thread for itself; copies must be complete (`GpuCounters.signal`).

        The next copies into the place come after loads by the barrier alone, but not after stores.
        """
        if stored:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.empty.at[self.place(turn)])

    def drain(self, turn: Turn) -> None:
        """By who fills, after the last turn."""
        lax.fori_loop(turn, turn + self.places, lambda later, _: self._wait_until_free(later), None)

    def _wait_until_free(self, turn: Turn) -> None:
        @pl.when(turn >= self.places)
        def _():
            plgpu.barrier_wait(self.empty.at[self.place(turn)])


class Queue(_Places):
    """Everyone reads every place."""

    @staticmethod
    def barriers(places: int, fills: int, readers: int) -> tuple[plgpu.Barrier, plgpu.Barrier]:
        """`full` and `empty`, as scratch: a place takes so many copies (or arrivals of who stores into it)."""
        return _barrier(places, fills), _barrier(places, readers)

    def filled(self, turn: Turn) -> None:
        """By everyone who has stored into the place; copies arrive by themselves."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.full.at[self.place(turn)])

    def before_read(self, turn: Turn) -> None:
        plgpu.barrier_wait(self.full.at[self.place(turn)])


@dataclasses.dataclass(frozen=True)
class Ring(_Places):
    """Each place is read by one team, that of its item: item % `teams`.

    A place has a barrier for each team, because a team never sees the phases of what others read.
    """

    slots: Any  # int32 [places, words]
    teams: int = CONSUMERS

    @staticmethod
    def barriers(
        places: int, teams: int = CONSUMERS, fills: int = 1
    ) -> tuple[tuple[plgpu.Barrier, ...], plgpu.Barrier]:
        """`full`, each of several teams, and `empty`, as scratch: a place takes so many copies."""
        together = min(teams, MAX_BARRIERS // places)
        return (_barrier(together * places, fills),) * -(-teams // together), _barrier(places)

    def fill(self, turn: Turn, team: Any, copy: Callable[[Any, Any], None]) -> None:
        """`copy(slot, barrier)` begins all copies into a slot."""
        self.before_fill(turn)
        self._each_full(turn, team, lambda barrier: copy(self.slots.at[self.place(turn)], barrier))

    def before_read(self, turn: Turn, team: Any) -> None:
        self._each_full(turn, team, plgpu.barrier_wait)

    def _each_full(self, turn: Turn, team: Any, use: Callable[[Any], None]) -> None:
        """Refs cannot be chosen at run time, so that there is code for each of `full` if the team is not known."""
        among = len(self.full)
        if isinstance(team, int):
            use(self.full[team % among].at[team // among * self.places + self.place(turn)])
            return
        index = lax.div(team, among) * self.places + self.place(turn)
        for number, barriers in enumerate(self.full):
            if among == 1:
                use(barriers.at[index])
            else:
                pl.when(lax.rem(team, among) == number)(lambda barriers=barriers: use(barriers.at[index]))


def _barrier(count: int, arrivals: int = 1) -> plgpu.Barrier:
    return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)
