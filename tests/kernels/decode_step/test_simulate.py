"""Projected times follow from the stated costs, and the chain explains all of a round."""

import dataclasses
import itertools

import pytest

from mimo_jax.config.geometry import target_of
from mimo_jax.config.presets import preset
from pallas_kernels.decode_step.assigned import assigned_rows, shard_of
from pallas_kernels.decode_step.schedule import Kind, Row, claimed_rows, step_phases
from pallas_kernels.decode_step.simulate import CPU, HOPPER, Costs, simulate

TINY = target_of(preset("mimo-tiny"))
TABLES = {
    "assigned": (assigned_rows(step_phases(shard_of(TINY, 2), 8), 2, 4), HOPPER),
    "claimed": (claimed_rows(step_phases(TINY, 8)), CPU),
}


def costs(**changes):
    """A byte per weight and microsecond; nothing else takes time unless a test says so."""
    free = Costs(
        bandwidth=1.0,
        efficiency=1.0,
        bytes_per_weight={},
        speedup={},
        fixed={},
        overhead=0.0,
        local=0.0,
        signal=0.0,
        hop=0.0,
        threads=2,
    )
    return dataclasses.replace(free, **changes)


def test_threads_claim_rows_when_they_are_free():
    """Three rows of 4, 2 and 3 on two threads, and one of 1 that waits for all of them and 2 for the signal."""
    weights = (4, 2, 3)
    rows = [Row(Kind.QKV, 0, share, 3, signals=(0,), weights=weights[share]) for share in range(3)]
    rows.append(Row(Kind.OUTPUT, 0, 0, 1, waits=((0, 3),), weights=1))
    timeline = simulate(rows, costs(local=2.0))
    assert timeline.starts == [0, 0, 2, 7]
    assert timeline.ends == [4, 2, 5, 8]
    assert timeline.roofline == 10 / 2
    assert timeline.exposed() == {0: {"QKV": 5.0, "OUTPUT": 1.0, "signal": 2.0}}


@pytest.mark.parametrize(("ring", "round_time"), [(0.0, 13), (2.0, 11), (4.0, 10), (20.0, 10)])
def test_weights_are_loaded_as_far_ahead_as_the_ring_allows(ring, round_time):
    """Ten bytes, one per microsecond, for a product that may begin after 3: the rest arrives while it works."""
    first = Row(Kind.QKV, 0, 0, 1, signals=(0,), worker=(0, 0, "consume"))
    load = Row(Kind.LOAD, 0, 0, 1, signals=(1,), worker=(0, 0, "weights"), of=Kind.OUTPUT, weights=10)
    product = Row(Kind.OUTPUT, 0, 0, 1, waits=((0, 1), (1, 1)), worker=(0, 0, "consume"))
    stated = costs(ring=ring, fixed={Kind.QKV: 3.0}, speedup={Kind.OUTPUT: 5.0})
    assert simulate([first, load, product], stated).round == pytest.approx(round_time)


@pytest.mark.parametrize("name", TABLES)
def test_times_respect_workers_and_waits(name):
    """A worker does one row at a time; the chain runs from the beginning to the end without a gap."""
    rows, stated = TABLES[name]
    timeline = simulate(rows, stated)
    done: dict[tuple, float] = {}
    for row, worker, start, end in zip(rows, timeline.workers, timeline.starts, timeline.ends):
        if row.kind != Kind.LOAD:  # whose copies go on while others wait for room
            assert done.get(worker, 0.0) <= start <= end
        done[worker] = end
    assert 0 < timeline.share < 1
    spans = timeline.chain
    assert spans[0].start == 0 and spans[-1].end == timeline.round
    assert all(before.end == after.start for before, after in itertools.pairwise(spans))
    assert sum(sum(parts.values()) for parts in timeline.exposed().values()) == pytest.approx(timeline.round)


@pytest.mark.parametrize("field", ["signal", "hop", "local", "overhead"])
def test_what_costs_more_takes_longer(field):
    """Every latency is part of the round."""
    rows, stated = TABLES["assigned"]
    dearer = dataclasses.replace(stated, **{field: getattr(stated, field) + 1})
    assert simulate(rows, dearer).round > simulate(rows, stated).round


def test_more_threads_are_not_slower():
    rows, stated = TABLES["claimed"]
    rounds = [simulate(rows, dataclasses.replace(stated, threads=threads)).round for threads in (1, 2, 4)]
    assert rounds == sorted(rounds, reverse=True)
