"""Where a `Program` runs, and what it is given: weights and buffers in global memory, and a CTA's shared memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from pallas_kernels.decode_step.schedule import Kind


class Machine(Protocol):
    """The operations of a role beside tiles. Integers are Python's, or traced."""

    cta: Any
    rank: Any  # of the device
    peers: Any  # all devices

    def call(self, tile: Callable, refs: Sequence[Any], scalars: dict[str, Any], state: Any = None) -> Any: ...

    def first_state(self, numbers: Sequence[float]) -> Any: ...

    def loop(self, first: Any, last: Any, body: Callable[[Any, Any], Any], carry: Any = None) -> Any: ...

    def when(self, condition: Any, run: Callable[[], None]) -> None: ...

    def integer(self, condition: Any) -> Any: ...

    def smaller(self, a: Any, b: Any) -> Any: ...

    def div(self, a: Any, b: Any) -> Any: ...

    def rem(self, a: Any, b: Any) -> Any: ...

    def part(self, ref: Any, first: Any, size: int) -> Any:
        """So many elements of a ref's only axis."""

    def copy(self, source: Any, place: Any, barrier: Any) -> None:
        """Into shared memory, in bulk."""

    def prefetch(self, source: Any, count: Any = 1) -> None:
        """Into the L2 cache, a contiguous ref and what follows, so many times its size; nobody waits for it."""

    def push(self, source: Any, ref: Any, first: Any, size: int) -> None:
        """From shared memory to each device's `ref`, in bulk."""

    def meet(self) -> None:
        """All consumers of the CTA."""

    def arrive(self, barrier: Any) -> None: ...

    def arrive_alone(self, barrier: Any) -> None:
        """Of a role's warp, which has nothing to show for it: in place of a copy."""

    def wait(self, barrier: Any) -> None: ...

    def count_round(self, counts: Any, place: int) -> None:
        """Adds one, once, though all threads of a team call it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """What a launch reads. Matrices are int32 [stack, row blocks, chunks, words], see `weights`."""

    embed: Any  # int32 [C * D / 2]
    gains: Any  # float32 as int32 [norms * D and some more]
    sinks: tuple[Any, Any]  # float32 [layers * H], of global and of sliding layers
    rotary: tuple[Any, Any]  # float32 [2 * capacity * rotary / 2]: cos and sin of each position
    matrices: dict[Kind, Any]
    expert_down: Any  # int32 [stack, row blocks * words]
    router: Any  # float32 as int32 [layers, CTAs, chunks, words]
    router_bias: Any  # float32 [layers * E]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffers:
    """What a launch writes, all flat and in global memory. Those up to `caches` need not outlive it."""

    x: Any
    stream: Any
    squares: Any
    qkv: Any
    partial: Any
    attended: Any
    scores: Any
    hidden: Any
    parts: Any  # [parity, CTAs, devices, columns * OWN_COLUMNS]
    candidates: Any
    caches: tuple[Any, Any]  # of global and of sliding layers: int32 [layers * K * blocks, words of a slot]
    logits: Any
    last: Any  # the final hidden state
    aux: Any
    expert_counts: Any
    best: Any
    best_logits: Any
    counts: Any
    fault: Any
    times: Any = None  # int32 [CTAs, rows, len(ROLES), len(STAMPS)], if they are asked for


STAMPS = ("begun", "ready", "done")  # of a role's row: before its wait, after it, after all; nanoseconds mod 2**32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """Shared memory of a CTA. `area` serves all kinds of rows, one after the other: pages, and sums behind them."""

    area: Any
    x: Any  # the stream's columns that the CTA owns
    own: Any  # sums for them
    factors: Any
    ids: Any
    routes: Any  # weights of the chosen experts
    lists: Any
    active: Any
    count: Any
    pairs: Any
    listed: Any  # a barrier: the list of experts is there
    staged: Any  # a barrier: `own` can be sent
