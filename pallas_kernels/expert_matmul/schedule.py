"""Which experts tokens choose, and which SM reads which tiles: the same arithmetic for kernels and for tests.

The tiles of all work groups form one list, and every SM takes an equal contiguous part. A work item, the least that is
distributed, is a row block of a K split: four tiles of gate and up, one of down. What is summed in which order is a
matter of tiles alone, so it depends neither on an item's place in the list nor on the list.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.expert_matmul.hopper_layout import Tiling
from pallas_kernels.expert_matmul.reference import work_groups


@dataclasses.dataclass(frozen=True)
class WorkList:
    """Work groups of one expert and some columns each, of which `count` exist.

    A column is a token; a pair is t * X + x for choice x of token t, and -1 in a column that is there for none.
    """

    count: Int[Array, "1"]
    experts_U: Int[Array, "U"]
    tokens_Uc: Int[Array, "U c"]
    pairs_Uc: Int[Array, "U c"]
    own_pair_TX: Int[Array, "T X"]  # the pair whose result this choice is; -1 where the id names no expert


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
    opens_UP = is_first_P[None, :] & (group_P[None, :] == number_P[:, None])
    experts_U = jnp.sum(jnp.where(opens_UP, ids_P[None, :], 0), axis=1).astype(jnp.int32)
    count = jnp.sum(is_first_P).astype(jnp.int32)
    is_chosen_UTX = (ids_TX[None] == experts_U[:, None, None]) & (number_P < count)[:, None, None]
    pairs_UT = jnp.min(jnp.where(is_chosen_UTX, number_P.reshape(1, tokens, chosen), ids_P.size), axis=2)
    pairs_UT = jnp.where(pairs_UT < ids_P.size, pairs_UT, -1).astype(jnp.int32)
    pairs_Uc = jnp.pad(pairs_UT, ((0, 0), (0, columns - tokens)), constant_values=-1)
    is_repeated_TXX = ids_TX[:, :, None] == ids_TX[:, None, :]  # the same expert twice in one token's list
    own_TX = jnp.min(jnp.where(is_repeated_TXX, number_P.reshape(tokens, 1, chosen), ids_P.size), axis=2)
    own_TX = jnp.where(is_held_P.reshape(tokens, chosen), own_TX, -1)
    tokens_Uc = jnp.broadcast_to(jnp.minimum(jnp.arange(columns, dtype=jnp.int32), tokens - 1), pairs_Uc.shape)
    return WorkList(count[None], experts_U, tokens_Uc, pairs_Uc, own_TX)


def sorted_work_list(ids_TX: Int[Array, "T X"], num_experts: int, columns: int) -> WorkList:
    """Of many tokens: the pairs sorted by expert, up to `columns` of one expert in a group."""
    experts_U, pairs_Uc = work_groups(ids_TX, num_experts, columns)
    count = jnp.sum(pairs_Uc[:, 0] >= 0, dtype=jnp.int32)
    number_TX = jnp.arange(ids_TX.size, dtype=jnp.int32).reshape(ids_TX.shape)
    own_TX = jnp.where(ids_TX < num_experts, number_TX, -1)
    tokens_Uc = jnp.maximum(pairs_Uc, 0) // ids_TX.shape[1]
    return WorkList(count[None], experts_U, tokens_Uc, pairs_Uc, own_TX)


@dataclasses.dataclass(frozen=True)
class StageContent:
    """What one pipeline stage holds: `count` work items, from item `start` of a stage of the Hopper layout on."""

    panel: Any
    group: Any
    k_split: Any
    stage: Any
    start: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class SmWork:
    """One SM's part of the list: `stages` stages over `panels` panels; the first and last stage may be incomplete."""

    schedule: Schedule
    groups: Any
    first: Any  # work items
    last: Any
    first_stage: Any
    stages: Any
    first_panel: Any
    panels: Any

    def content(self, index: Any) -> StageContent:
        """Of the `index`-th stage."""
        schedule, stage = self.schedule, self.first_stage + index
        length = schedule.panel_stages(self.groups)
        panel = self.first_panel if schedule.are_panels_shared else _divide(stage, length)
        if schedule.are_panels_shared:
            for later in range(1, schedule.max_panels):  # dividing by a number that is not known before takes longer
                panel = panel + (stage >= (self.first_panel + later) * length)
        within = stage - panel * length
        tiling = schedule.tiling
        start, count = 0 * stage, 1 + 0 * stage
        if tiling.stage_items > 1:
            begin = _larger(self.first, stage * tiling.stage_items)
            end = _smaller(self.last, (stage + 1) * tiling.stage_items)
            start, count = begin - stage * tiling.stage_items, end - begin
        if schedule.are_panels_shared:
            group = _divide(within, tiling.stages)
            return StageContent(panel, group, panel, within - group * tiling.stages, start, count)
        group = _divide(panel, tiling.k_splits)
        return StageContent(panel, group, panel - group * tiling.k_splits, within, start, count)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the list of tiles is distributed over SMs.

    A panel is what a K split of a group needs of the activations. Where groups have all columns in common, they share
    the panels, and K splits come first in the list, so that an SM sees few of them.
    """

    tiling: Tiling
    sms: int
    max_groups: int
    are_panels_shared: bool

    @property
    def item_bytes(self) -> int:
        return 4 * self.tiling.stage_words // self.tiling.stage_items

    def panel_stages(self, groups: Any) -> Any:
        """Stages that need the same panel."""
        return groups * self.tiling.stages if self.are_panels_shared else self.tiling.stages

    @property
    def max_panels(self) -> int:
        """Panels that one SM's work can touch."""
        panels = self.tiling.k_splits * (1 if self.are_panels_shared else self.max_groups)
        return min(panels, -(-panels // self.sms) + 1)

    def items(self, groups: Any) -> Any:
        """Work items of so many groups."""
        return groups * (self.tiling.k_splits * self.tiling.stages * self.tiling.stage_items)

    def sm_work(self, sm: Any, groups: Any) -> SmWork:
        """The part of an SM when there are so many groups."""
        items = self.items(groups)
        first, last = (_divide(number * items, self.sms) for number in (sm, sm + 1))
        first_stage = _divide(first, self.tiling.stage_items)
        stages = _divide(last + self.tiling.stage_items - 1, self.tiling.stage_items) - first_stage
        stages = stages * (last > first)
        length = _larger(self.panel_stages(groups), 1)
        first_panel = _divide(first_stage, length)
        panels = (_divide(first_stage + stages - 1, length) - first_panel + 1) * (stages > 0)
        return SmWork(self, groups, first, last, first_stage, stages, first_panel, panels)


def _divide(a: Any, b: Any) -> Any:
    """Of numbers that are not negative; `//` would round the right way for others too, at twice the instructions."""
    if isinstance(a, (int, np.integer)) and isinstance(b, (int, np.integer)):
        return a // b
    return jax.lax.div(jnp.int32(a), jnp.int32(b))


def _larger(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, (int, np.integer)) and isinstance(b, (int, np.integer)) else jnp.maximum(a, b)


def _smaller(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, (int, np.integer)) and isinstance(b, (int, np.integer)) else jnp.minimum(a, b)
