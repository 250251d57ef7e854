"""Who reads what: every touched tile exactly once, by processors with equal shares, whatever the routing."""

import numpy as np
import pytest

from pallas_kernels.expert_matmul import mosaic_gpu
from pallas_kernels.expert_matmul.layout import down_tiling, gate_up_tiling
from pallas_kernels.expert_matmul.schedule import Shares, work_list
from pallas_kernels.expert_matmul.shapes import FLASH_TP8, PRO_EP8, PRO_TP8
from tests.kernels.expert_matmul.samples import CASES, routing

CUTS = [cut(shape.hidden, shape.features) for shape in (PRO_TP8, FLASH_TP8) for cut in (gate_up_tiling, down_tiling)]


def parts_of(cut, groups: int, processors: int = mosaic_gpu.PROCESSORS, pairs: int = 128):
    """For each processor, the units that it reads in order: (page, group, granule, row block)."""
    deal = Shares(cut, processors, pairs)
    for processor in range(processors):
        part = deal.of(processor, groups)
        units = []
        for index in range(part.slots):
            place = part.place(index)
            for unit in range(place.start, place.start + place.count):
                units.append((place.page, place.group, place.granule, place.slot * cut.units + unit))
        yield part, units


@pytest.mark.parametrize("cut", [*CUTS, down_tiling(PRO_EP8.hidden, PRO_EP8.features)])
@pytest.mark.parametrize("groups", [0, 1, 7, 8, 9, 59, 128])
def test_every_tile_is_read_exactly_once(cut, groups):
    """No tile of a touched expert is missed or read twice; a part's pages are those that it has buffers for."""
    seen = []
    for part, units in parts_of(cut, groups):
        pages = sorted({page for page, *_ in units})
        assert pages == list(range(part.first_page, part.first_page + part.pages))
        assert part.pages <= part.shares.most_pages
        seen += [unit[1:] for unit in units]
    rows = cut.slots * cut.units
    expected = {(g, h, r) for g in range(groups) for h in range(cut.granules) for r in range(rows)}
    assert len(seen) == len(expected) and set(seen) == expected


@pytest.mark.parametrize("cut", CUTS)
def test_shares_are_equal_whatever_the_routing(cut):
    """At most 5 % above the mean from 8 distinct experts on, the fewest that any token of the real models chooses."""
    worst = 0.0
    for groups in range(8, 129):
        deal = Shares(cut, mosaic_gpu.PROCESSORS, 128)
        parts = [deal.of(processor, groups) for processor in range(deal.processors)]
        counts = [part.last - part.first for part in parts]
        worst = max(worst, max(counts) / np.mean(counts))
    assert worst <= 1.05


@pytest.mark.parametrize("cut", CUTS)
def test_bytes_requested_are_bytes_needed(cut):
    """What all processors copy is codes and scales of the touched experts: 4.25 bits per weight, and nothing else."""
    for groups in (8, 59):
        copied = sum(len(units) for _, units in parts_of(cut, groups)) * Shares(cut, 132, 128).unit_bytes
        assert copied == groups * cut.rows * cut.cols * 17 // 32


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
