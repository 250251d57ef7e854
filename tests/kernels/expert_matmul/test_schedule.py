"""Who reads what: every group's tiles exactly once, by processors with equal shares, whatever the routing."""

import random
from collections.abc import Iterator

import numpy as np
import pytest

from pallas_kernels.expert_matmul import mosaic_gpu
from pallas_kernels.expert_matmul.layout import down_tiling, gate_up_tiling
from pallas_kernels.expert_matmul.schedule import Share, sorted_work_list, work_list
from pallas_kernels.expert_matmul.shapes import FLASH_TP8, PRO_EP8, PRO_TP8
from tests.kernels.expert_matmul.samples import CASES, routing

CUTS = [cut(shape.hidden, shape.features) for shape in (PRO_TP8, FLASH_TP8) for cut in (gate_up_tiling, down_tiling)]


def plan_of(cut, tokens: int, machine: mosaic_gpu.Machine = mosaic_gpu.HOPPER) -> mosaic_gpu.Plan:
    return machine.plan(cut, tokens, PRO_TP8.chosen, PRO_TP8.experts)


def parts_of(cut, groups: int, tokens: int):
    """For each processor, the units that it reads in order: (page, group, granule, row block)."""
    deal = plan_of(cut, tokens).shares
    for processor in range(deal.processors):
        part = deal.of(processor, groups)
        units = []
        for index in range(part.slots):
            place = part.place(index)
            for unit in range(place.start, place.start + place.count):
                units.append((place.page, place.group, place.granule, place.slot * cut.units + unit))
        yield part, units


@pytest.mark.parametrize("cut", [*CUTS, down_tiling(PRO_EP8.hidden, PRO_EP8.features)])
@pytest.mark.parametrize(
    ("tokens", "groups"), [*((16, groups) for groups in (0, 1, 7, 8, 9, 59, 128)), (256, 9), (256, 382)]
)
def test_every_tile_is_read_exactly_once(cut, tokens, groups):
    """No tile of a group is missed or read twice; a part's pages follow each other, and are as many as it says."""
    seen = []
    for part, units in parts_of(cut, groups, tokens):
        pages = sorted({page for page, *_ in units})
        assert pages == list(range(part.first_page, part.first_page + part.pages))
        assert part.pages <= part.shares.most_pages
        seen += [unit[1:] for unit in units]
    rows = cut.slots * cut.units
    expected = {(g, h, r) for g in range(groups) for h in range(cut.granules) for r in range(rows)}
    assert len(seen) == len(expected) and set(seen) == expected


@pytest.mark.parametrize("cut", CUTS)
def test_shares_are_equal_whatever_the_routing(cut):
    """At most 5 % above the mean from 8 groups on, the fewest distinct experts of any token of the real models."""
    worst = 0.0
    cases = [*((16, groups) for groups in range(8, 129)), *((256, groups) for groups in range(8, 513, 7))]
    for tokens, groups in cases:
        deal = plan_of(cut, tokens).shares
        parts = [deal.of(processor, groups) for processor in range(deal.processors)]
        counts = [part.last - part.first for part in parts]
        worst = max(worst, max(counts) / np.mean(counts))
    assert worst <= 1.05


@pytest.mark.parametrize("cut", CUTS)
def test_bytes_requested_are_bytes_needed(cut):
    """What all processors copy is codes and scales of the groups' experts: 4.25 bits per weight, and nothing else."""
    for tokens, groups in ((16, 8), (16, 59), (256, 382)):
        unit_bytes = plan_of(cut, tokens).shares.unit_bytes
        copied = sum(len(units) for _, units in parts_of(cut, groups, tokens)) * unit_bytes
        assert copied == groups * cut.rows * cut.cols * 17 // 32


class Rings:
    """One processor's warps as coroutines that take turns at random; each yields while it has to wait."""

    def __init__(self, plan: mosaic_gpu.Plan, part: Share, seed: int) -> None:
        self.plan, self.part, self.random = plan, part, random.Random(seed)
        self.pages = [part.place(index).page - part.first_page for index in range(part.slots)]
        self.held = [-1] * plan.pages  # the page in each buffer
        self.loaded = self.issued = 0  # pages, slots
        self.left = [0] * plan.consumers  # pages that each warpgroup has left
        self.done = [False] * part.slots

    def produce(self) -> Iterator[None]:
        for index, page in enumerate(self.pages):
            if page >= self.loaded:
                while min(self.left) <= page - self.plan.pages:
                    yield
                self.held[page % self.plan.pages] = page
                self.loaded += 1
            while index >= self.plan.slots and not self.done[index - self.plan.slots]:
                yield
            self.issued += 1

    def consume(self, warpgroup: int) -> Iterator[None]:
        entered = 0
        for index in range(warpgroup, self.part.slots, self.plan.consumers):
            for page in range(entered, self.pages[index] + 1):
                self.left[warpgroup] = page
                while self.loaded <= page:
                    yield
            entered = self.pages[index] + 1
            while self.issued <= index:
                yield
            yield
            assert self.held[self.pages[index] % self.plan.pages] == self.pages[index]
            self.done[index] = True
        self.left[warpgroup] = self.part.pages

    def run(self) -> None:
        running = [self.produce(), *map(self.consume, range(self.plan.consumers))]
        rounds = 0
        while running:
            self.random.shuffle(running)
            running = [warps for warps in running if next(warps, self) is None]
            rounds += 1
            assert rounds < 4 * self.part.slots + 100, "all wait for each other"


@pytest.mark.parametrize("cut", [*CUTS, down_tiling(PRO_EP8.hidden, PRO_EP8.features), down_tiling(512, 256)])
@pytest.mark.parametrize("groups", [9, 382])
def test_pages_stay_until_all_warpgroups_left_them(cut, groups):
    """Two buffers serve any number of pages: none is refilled too early, and nobody waits for ever."""
    plan = plan_of(cut, 256)
    for processor in range(0, plan.shares.processors, 5):
        Rings(plan, plan.shares.of(processor, groups), processor).run()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [17, 64])
def test_the_sorted_list_names_each_pair_once(tokens, case):
    """Groups hold up to 16 pairs of their expert, of any token; no more groups exist than a plan has room for."""
    ids = routing(tokens, case, experts=24, chosen=8)
    work = sorted_work_list(ids, 24, 16)
    count, pairs = int(work.count[0]), np.asarray(work.pairs)
    assert count == sum(-(-number // 16) for number in np.bincount(ids[ids < 24])) <= len(pairs)
    groups, columns = np.nonzero(pairs >= 0)
    named = pairs[groups, columns]
    assert sorted(named) == sorted(np.flatnonzero(ids.reshape(-1) < 24)) and (pairs[count:] == -1).all()
    np.testing.assert_array_equal(ids.reshape(-1)[named], np.asarray(work.experts)[groups])
    np.testing.assert_array_equal(named // 8, np.asarray(work.tokens)[groups, columns])
    np.testing.assert_array_equal(work.own_pair, np.where(ids < 24, np.arange(ids.size).reshape(ids.shape), -1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16])
def test_the_work_list_names_each_touched_expert_once(tokens, case):
    """Its groups are the distinct experts; each choice finds its own expert's column again, and nothing else does."""
    ids = routing(tokens, case, experts=24, chosen=8)
    columns = -(-tokens // 8) * 8
    work = work_list(ids, 24, columns)
    count = int(work.count[0])
    experts, pairs, own = np.asarray(work.experts)[:count], np.asarray(work.pairs), np.asarray(work.own_pair)
    assert sorted(experts) == sorted(set(ids[ids < 24]))
    assert (pairs[count:] == -1).all() and (pairs[:, tokens:] == -1).all()
    assert (np.asarray(work.tokens)[:, :tokens] == np.arange(tokens)).all() and np.max(work.tokens) < tokens
    for group, expert in enumerate(experts):
        for token in range(tokens):
            places = np.flatnonzero(ids[token] == expert)
            expected = -1 if places.size == 0 else token * 8 + places[0]
            assert pairs[group, token] == expected
    expected = np.where(ids < 24, np.arange(ids.size).reshape(ids.shape), -1)
    np.testing.assert_array_equal(own, expected)


def test_an_expert_chosen_twice_by_one_token_is_computed_once():
    """Both choices read the first one's result."""
    work = work_list(np.array([[4, 4, 2], [2, 9, 2]], np.int32), 9, 8)
    assert int(work.count[0]) == 2
    np.testing.assert_array_equal(work.own_pair, [[0, 0, 2], [3, -1, 3]])
