"""Which experts tokens touch, and which processor reads which tiles: the same arithmetic for kernels and for tests.

The tiles of all groups form one list, and every processor takes an equal contiguous part. A unit, the least
that is dealt out, is a row block of a granule: four tiles of gate and up, one of down. What is summed
in which order is a matter of tiles alone, so it depends neither on a unit's place in the list nor on the list.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.expert_matmul.layout import Tiling
from pallas_kernels.expert_matmul.reference import blocks_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WorkList:
    """Groups of one expert and some columns each, of which `count` exist.

    A column is a token; a pair is t * X + x for choice x of token t, and -1 in a column that is there for none.
    """

    count: Int[Array, "1"]
    experts: Int[Array, "G"]
    tokens: Int[Array, "G N"]
    pairs: Int[Array, "G N"]
    own_pair: Int[Array, "T X"]  # the pair whose result this choice is; -1 where the id names no expert


def work_list(ids_TX: Int[Array, "T X"], num_experts: int, columns: int) -> WorkList:
    """Of few tokens: a group for each distinct expert in the order they first appear, and in each all tokens.

    Comparisons of all pairs with all pairs: for at most 128 of them one small fused loop, where a sort is many.
    """
    tokens, chosen = ids_TX.shape
    ids_P = ids_TX.reshape(-1)
    number_P = jnp.arange(ids_P.size, dtype=jnp.int32)
    is_held_P = (ids_P >= 0) & (ids_P < num_experts)
    is_same_PP = (ids_P[:, None] == ids_P[None, :]) & is_held_P[:, None]
    first_P = jnp.min(jnp.where(is_same_PP, number_P[None, :], ids_P.size), axis=1)
    is_first_P = is_held_P & (first_P == number_P)
    group_P = jnp.sum(jnp.where(is_first_P[None, :] & (number_P[None, :] < number_P[:, None]), 1, 0), axis=1)
    # A group's expert is the id of the pair that opened it.
    opens_GP = is_first_P[None, :] & (group_P[None, :] == number_P[:, None])
    experts_G = jnp.sum(jnp.where(opens_GP, ids_P[None, :], 0), axis=1).astype(jnp.int32)
    count = jnp.sum(is_first_P).astype(jnp.int32)
    is_chosen_GTX = (ids_TX[None] == experts_G[:, None, None]) & (number_P < count)[:, None, None]
    pairs_GT = jnp.min(jnp.where(is_chosen_GTX, number_P.reshape(1, tokens, chosen), ids_P.size), axis=2)
    pairs_GT = jnp.where(pairs_GT < ids_P.size, pairs_GT, -1).astype(jnp.int32)
    pairs_GN = jnp.pad(pairs_GT, ((0, 0), (0, columns - tokens)), constant_values=-1)
    is_twin_TXX = ids_TX[:, :, None] == ids_TX[:, None, :]  # the same expert twice in one token's list
    own_TX = jnp.min(jnp.where(is_twin_TXX, number_P.reshape(tokens, 1, chosen), ids_P.size), axis=2)
    own_TX = jnp.where(is_held_P.reshape(tokens, chosen), own_TX, -1)
    tokens_GN = jnp.broadcast_to(jnp.minimum(jnp.arange(columns, dtype=jnp.int32), tokens - 1), pairs_GN.shape)
    return WorkList(count[None], experts_G, tokens_GN, pairs_GN, own_TX)


def sorted_work_list(ids_TX: Int[Array, "T X"], num_experts: int, columns: int) -> WorkList:
    """Of many tokens: the pairs sorted by expert, up to `columns` of one expert in a group."""
    experts_G, pairs_S = blocks_of(ids_TX, num_experts, columns)
    pairs_GN = pairs_S.reshape(-1, columns)
    count = jnp.sum(pairs_GN[:, 0] >= 0, dtype=jnp.int32)
    number_TX = jnp.arange(ids_TX.size, dtype=jnp.int32).reshape(ids_TX.shape)
    own_TX = jnp.where(ids_TX < num_experts, number_TX, -1)
    tokens_GN = jnp.maximum(pairs_GN, 0) // ids_TX.shape[1]
    return WorkList(count[None], experts_G, tokens_GN, pairs_GN, own_TX)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a slot of a processor's part lies: `count` units from unit `start` of a slot on."""

    page: Any
    group: Any
    granule: Any
    slot: Any
    start: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class Share:
    """One processor's part: `slots` slots over `pages` pages; the first and last slot may be cut."""

    shares: Shares
    groups: Any
    first: Any  # units
    last: Any
    first_slot: Any
    slots: Any
    first_page: Any
    pages: Any

    def place(self, index: Any) -> Place:
        """The `index`-th slot of the part."""
        deal, slot = self.shares, self.first_slot + index
        length = deal.page_slots(self.groups)
        page = self.first_page if deal.is_shared else _divide(slot, length)
        if deal.is_shared:
            for later in range(1, deal.most_pages):  # dividing by a number that is not known before takes longer
                page = page + (slot >= (self.first_page + later) * length)
        within = slot - page * length
        cut = deal.cut
        start, count = 0 * slot, 1 + 0 * slot
        if cut.units > 1:
            begin, end = _larger(self.first, slot * cut.units), _smaller(self.last, (slot + 1) * cut.units)
            start, count = begin - slot * cut.units, end - begin
        if deal.is_shared:
            group = _divide(within, cut.slots)
            return Place(page, group, page, within - group * cut.slots, start, count)
        group = _divide(page, cut.granules)
        return Place(page, group, page - group * cut.granules, within, start, count)


@dataclasses.dataclass(frozen=True)
class Shares:
    """How a list of tiles is dealt out.

    A page is what a granule of a group needs of the activations. Where groups share all columns' activations, they
    share the pages, and granules come first in the list, so that a part sees few of them.
    """

    cut: Tiling
    processors: int
    most_groups: int
    is_shared: bool

    @property
    def unit_bytes(self) -> int:
        return 4 * self.cut.slot_words // self.cut.units

    def page_slots(self, groups: Any) -> Any:
        return groups * self.cut.slots if self.is_shared else self.cut.slots

    @property
    def most_pages(self) -> int:
        """Pages that one part can touch."""
        pages = self.cut.granules * (1 if self.is_shared else self.most_groups)
        return min(pages, -(-pages // self.processors) + 1)

    def units(self, groups: Any) -> Any:
        return groups * (self.cut.granules * self.cut.slots * self.cut.units)

    def of(self, processor: Any, groups: Any) -> Share:
        """The part of a processor when there are `groups` experts."""
        units = self.units(groups)
        first, last = (_divide(number * units, self.processors) for number in (processor, processor + 1))
        first_slot = _divide(first, self.cut.units)
        slots = _divide(last + self.cut.units - 1, self.cut.units) - first_slot
        slots = slots * (last > first)
        length = _larger(self.page_slots(groups), 1)
        first_page = _divide(first_slot, length)
        pages = (_divide(first_slot + slots - 1, length) - first_page + 1) * (slots > 0)
        return Share(self, groups, first, last, first_slot, slots, first_page, pages)


def _divide(a: Any, b: Any) -> Any:
    """Of numbers that are not negative; `//` would round the right way for others too, at twice the instructions."""
    if isinstance(a, (int, np.integer)) and isinstance(b, (int, np.integer)):
        return a // b
    return jax.lax.div(jnp.int32(a), jnp.int32(b))


def _larger(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, (int, np.integer)) and isinstance(b, (int, np.integer)) else jnp.maximum(a, b)


def _smaller(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, (int, np.integer)) and isinstance(b, (int, np.integer)) else jnp.minimum(a, b)
