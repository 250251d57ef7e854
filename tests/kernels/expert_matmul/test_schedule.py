"""Who reads what: every group's tiles exactly once, by SMs with equal work, whatever the routing."""

import random
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_matmul import mosaic_gpu
from pallas_kernels.expert_matmul.hopper_layout import down_tiling, gate_up_tiling
from pallas_kernels.expert_matmul.schedule import SmWork, sorted_work_list, work_list
from pallas_kernels.expert_matmul.shapes import FLASH_TP8, PRO_EP8, PRO_TP8
from tests.kernels.expert_matmul.samples import CASES, routing

TILINGS = [
    tiling_of(shape.hidden, shape.features)
    for shape in (PRO_TP8, FLASH_TP8)
    for tiling_of in (gate_up_tiling, down_tiling)
]


def config_of(tiling, tokens: int) -> mosaic_gpu.KernelConfig:
    return mosaic_gpu.HOPPER.kernel_config(tiling, tokens, PRO_TP8.chosen, PRO_TP8.experts)


def works_of(tiling, groups: int, tokens: int):
    """For each SM, the work items that it reads in order: (panel, group, K split, row block)."""
    schedule = config_of(tiling, tokens).schedule
    for sm in range(schedule.sms):
        work = schedule.sm_work(sm, groups)
        items = []
        for index in range(work.stages):
            content = work.content(index)
            for item in range(content.start, content.start + content.count):
                row_block = content.stage * tiling.stage_items + item
                items.append((content.panel, content.group, content.k_split, row_block))
        yield work, items


@pytest.mark.parametrize("tiling", [*TILINGS, down_tiling(PRO_EP8.hidden, PRO_EP8.features)])
@pytest.mark.parametrize(
    ("tokens", "groups"), [*((16, groups) for groups in (0, 1, 7, 8, 9, 59, 128)), (256, 9), (256, 382)]
)
def test_every_tile_is_read_exactly_once(tiling, tokens, groups):
    """No tile of a group is missed or read twice; an SM's panels follow each other, and are as many as it says."""
    seen = []
    for work, items in works_of(tiling, groups, tokens):
        panels = sorted({panel for panel, *_ in items})
        assert panels == list(range(work.first_panel, work.first_panel + work.panels))
        assert work.panels <= work.schedule.max_panels
        seen += [item[1:] for item in items]
    rows = tiling.stages * tiling.stage_items
    expected = {(g, k, r) for g in range(groups) for k in range(tiling.k_splits) for r in range(rows)}
    assert len(seen) == len(expected) and set(seen) == expected


@pytest.mark.parametrize("tiling", TILINGS)
def test_work_is_equal_whatever_the_routing(tiling):
    """At most 5 % above the mean from 8 groups on, the fewest distinct experts of any token of the real models."""
    worst = 0.0
    cases = [*((16, groups) for groups in range(8, 129)), *((256, groups) for groups in range(8, 513, 7))]
    for tokens, groups in cases:
        schedule = config_of(tiling, tokens).schedule
        works = [schedule.sm_work(sm, groups) for sm in range(schedule.sms)]
        counts = [work.last - work.first for work in works]
        worst = max(worst, max(counts) / np.mean(counts))
    assert worst <= 1.05


@pytest.mark.parametrize("tiling", TILINGS)
def test_bytes_requested_are_bytes_needed(tiling):
    """What all SMs copy is codes and scales of the groups' experts: 4.25 bits per weight, and nothing else."""
    for tokens, groups in ((16, 8), (16, 59), (256, 382)):
        item_bytes = config_of(tiling, tokens).schedule.item_bytes
        copied = sum(len(items) for _, items in works_of(tiling, groups, tokens)) * item_bytes
        assert copied == groups * tiling.rows * tiling.cols * 17 // 32


class Pipeline:
    """One SM's warps as coroutines that take turns at random; each yields while it has to wait."""

    def __init__(self, config: mosaic_gpu.KernelConfig, work: SmWork, seed: int) -> None:
        self.config, self.work, self.random = config, work, random.Random(seed)
        self.panels = [work.content(index).panel - work.first_panel for index in range(work.stages)]
        self.held = [-1] * config.buffers  # the panel in each buffer
        self.loaded = self.issued = 0  # panels, stages
        self.left = [0] * config.consumers  # panels that each warpgroup has left
        self.done = [False] * work.stages

    def produce(self) -> Iterator[None]:
        for index, panel in enumerate(self.panels):
            if panel >= self.loaded:
                while min(self.left) <= panel - self.config.buffers:
                    yield
                self.held[panel % self.config.buffers] = panel
                self.loaded += 1
            while index >= self.config.stages and not self.done[index - self.config.stages]:
                yield
            self.issued += 1

    def consume(self, warpgroup: int) -> Iterator[None]:
        entered = 0
        for index in range(warpgroup, self.work.stages, self.config.consumers):
            for panel in range(entered, self.panels[index] + 1):
                self.left[warpgroup] = panel
                while self.loaded <= panel:
                    yield
            entered = self.panels[index] + 1
            while self.issued <= index:
                yield
            yield
            assert self.held[self.panels[index] % self.config.buffers] == self.panels[index]
            self.done[index] = True
        self.left[warpgroup] = self.work.panels

    def run(self) -> None:
        running = [self.produce(), *map(self.consume, range(self.config.consumers))]
        rounds = 0
        while running:
            self.random.shuffle(running)
            running = [warps for warps in running if next(warps, self) is None]
            rounds += 1
            assert rounds < 4 * self.work.stages + 100, "all wait for each other"


@pytest.mark.parametrize("tiling", [*TILINGS, down_tiling(PRO_EP8.hidden, PRO_EP8.features), down_tiling(512, 256)])
@pytest.mark.parametrize("groups", [9, 382])
def test_panels_stay_until_all_warpgroups_left_them(tiling, groups):
    """Two buffers serve any number of panels: none is refilled too early, and nobody waits for ever."""
    config = config_of(tiling, 256)
    for sm in range(0, config.schedule.sms, 5):
        Pipeline(config, config.schedule.sm_work(sm, groups), sm).run()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [17, 64])
def test_the_sorted_list_names_each_pair_once(tokens, case):
    """Groups hold up to 16 pairs of their expert, of any token; no more groups exist than a kernel has room for."""
    ids = routing(tokens, case, experts=24, chosen=8)
    work = sorted_work_list(jnp.asarray(ids), 24, 16)
    count, pairs = int(work.count[0]), np.asarray(work.pairs_Uc)
    assert count == sum(-(-number // 16) for number in np.bincount(ids[ids < 24])) <= len(pairs)
    groups, columns = np.nonzero(pairs >= 0)
    named = pairs[groups, columns]
    assert sorted(named) == sorted(np.flatnonzero(ids.reshape(-1) < 24)) and (pairs[count:] == -1).all()
    np.testing.assert_array_equal(ids.reshape(-1)[named], np.asarray(work.experts_U)[groups])
    np.testing.assert_array_equal(named // 8, np.asarray(work.tokens_Uc)[groups, columns])
    np.testing.assert_array_equal(work.own_pair_TX, np.where(ids < 24, np.arange(ids.size).reshape(ids.shape), -1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16])
def test_the_work_list_names_each_active_expert_once(tokens, case):
    """Its groups are the distinct experts; each choice finds its own expert's column again, and nothing else does."""
    ids = routing(tokens, case, experts=24, chosen=8)
    columns = -(-tokens // 8) * 8
    work = work_list(jnp.asarray(ids), 24, columns)
    count = int(work.count[0])
    experts, pairs, own = np.asarray(work.experts_U)[:count], np.asarray(work.pairs_Uc), np.asarray(work.own_pair_TX)
    assert sorted(experts) == sorted(set(ids[ids < 24]))
    assert (pairs[count:] == -1).all() and (pairs[:, tokens:] == -1).all()
    assert (np.asarray(work.tokens_Uc)[:, :tokens] == np.arange(tokens)).all() and np.max(work.tokens_Uc) < tokens
    for group, expert in enumerate(experts):
        for token in range(tokens):
            choices = np.flatnonzero(ids[token] == expert)
            expected = -1 if choices.size == 0 else token * 8 + choices[0]
            assert pairs[group, token] == expected
    expected = np.where(ids < 24, np.arange(ids.size).reshape(ids.shape), -1)
    np.testing.assert_array_equal(own, expected)


def test_an_expert_chosen_twice_by_one_token_is_computed_once():
    """Both choices read the first one's result."""
    work = work_list(jnp.array([[4, 4, 2], [2, 9, 2]]), 9, 8)
    assert int(work.count[0]) == 2
    np.testing.assert_array_equal(work.own_pair_TX, [[0, 0, 2], [3, -1, 3]])
