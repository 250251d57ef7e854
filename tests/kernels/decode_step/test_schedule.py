"""Every table of rows is accepted, and none that is accepted can be broken by bad luck."""

import collections
import dataclasses

import numpy as np
import pytest

from mimo_jax.config.geometry import drafter_of, target_of
from mimo_jax.config.model import PUBLISHED
from mimo_jax.config.presets import PRESETS, drafter_preset, preset
from mimo_jax.planning.traffic import Plan, distinct_experts, round_reads
from mimo_jax.sharding import MeshShape
from pallas_kernels.decode_step.assigned import assigned_rows, shard_of
from pallas_kernels.decode_step.schedule import (
    COLUMNS,
    Kind,
    claimed_rows,
    context_phases,
    draft_phases,
    encode,
    step_phases,
)
from pallas_kernels.decode_step.simulate import PUBLISHED_BYTES
from pallas_kernels.decode_step.validate import validate
from tests.kernels.decode_step.mutants import KINDS, mutants, run_adversarially
from tests.tiny import tiny_config

TOKENS = (1, 4, 8, 16)
SIZES = [name for name in PRESETS if "v2.6" not in name]  # which are the sizes of V2.5
SEEDS = 4  # of the executor, for each mutant that is accepted


def assigned(target, tokens, devices, ctas):
    return assigned_rows(step_phases(shard_of(target, devices), tokens), devices, ctas)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", SIZES)
def test_tables_of_threads_are_accepted(name, tokens):
    """Every published model, in full."""
    rows = claimed_rows(step_phases(target_of(preset(name)), tokens))
    assert validate(rows) is None


@pytest.mark.parametrize("bias_rank", [0, 64])
@pytest.mark.parametrize("lookup", [0, 512])
def test_a_round_with_a_drafter_is_accepted(bias_rank, lookup):
    """What the target has read, a block of drafts, and the step that verifies it: in one table."""
    config = preset("mimo-v2.5-pro")
    published = dataclasses.replace(drafter_preset("mimo-v2.5-pro"), bias_rank=bias_rank, lookup=lookup)
    drafter = drafter_of(published, config)
    phases = [*context_phases(drafter, 8), *draft_phases(drafter), *step_phases(target_of(config), 8)]
    assert validate(claimed_rows(phases)) is None


@pytest.mark.parametrize(("devices", "ctas", "tokens"), [(1, 3, 1), (1, 2, 4), (1, 2, 8), (1, 1, 16), (8, 1, 8)])
@pytest.mark.parametrize("name", SIZES)
def test_tables_of_hopper_are_accepted(name, devices, ctas, tokens):
    """Every published model with few CTAs; `tests/tools/whole_tables.py` checks 132 of them."""
    assert validate(assigned(target_of(preset(name)), tokens, devices, ctas)) is None


@pytest.mark.parametrize(("devices", "ctas", "tokens"), [(8, 3, 1), (8, 2, 4), (8, 2, 16), (2, 20, 8)])
def test_tables_of_many_devices_are_accepted(devices, ctas, tokens):
    """The bundled model on up to 8 devices."""
    assert validate(assigned(target_of(preset("mimo-tiny")), tokens, devices, ctas)) is None


def test_a_row_waits_for_two_counters_at_most():
    """What a worker polls, and what the native table has room for."""
    target = target_of(preset("mimo-tiny"))
    assert max(len(row.waits) for row in assigned(target, 8, 8, 2)) == 2
    assert max(len(row.waits) for row in claimed_rows(step_phases(target, 8))) == 1


SMALL = target_of(tiny_config(layer_pattern=(0, 1), moe_pattern=(0, 1)))
WIDE = dataclasses.replace(SMALL, width=256, features=512, expert_features=128)  # split into several rows
TABLES = {
    "claimed": (claimed_rows(step_phases(WIDE, 4)), 1600),
    "one device": (assigned(SMALL, 4, 1, 2), 1400),
    "two devices": (assigned(SMALL, 4, 2, 1), 1600),
    "two devices of two": (assigned(SMALL, 4, 2, 2), 400),
}


@pytest.mark.parametrize("name", TABLES)
def test_no_accepted_mutant_can_be_broken(name, capsys):
    """One thing wrong, of nineteen kinds: rejected, or harmless whatever the order and the workers' speeds."""
    rows, count = TABLES[name]
    assert validate(rows) is None
    assert {run_adversarially(rows, seed) for seed in range(20)} == {None}
    made, rejected, accepted = collections.Counter(), collections.Counter(), []
    for kind, table in mutants(rows, count, seed=1):
        made[kind] += 1
        if validate(table) is None:
            accepted.append((kind, table))
        else:
            rejected[kind] += 1
    broken = [
        (kind, problem)
        for kind, table in accepted
        for seed in range(SEEDS)
        if (problem := run_adversarially(table, seed))
    ]
    with capsys.disabled():
        print(f"\n{name}: {len(rows)} rows; mutants and how many are rejected:")
        print(", ".join(f"{kind} {made[kind]}/{rejected[kind]}" for kind in sorted(made)))
        print(f"{sum(rejected.values())} of {count}; {SEEDS * len(accepted)} runs of the others")
    assert not broken
    assert sum(rejected.values()) > 0.7 * count  # the executor is given something to do, the validator most of it


def test_there_are_enough_mutants():
    """Five thousand in all, of every kind that the tables allow."""
    assert sum(count for _, count in TABLES.values()) >= 5000
    made = {kind for rows, _ in TABLES.values() for kind, _ in mutants(rows, 300, seed=2)}
    assert made == {kind.__name__ for kind in KINDS}


def test_the_executor_breaks_tables_that_are_wrong():
    """Without any waits, with half of the signals, or with rows the wrong way round, something goes wrong."""
    rows = TABLES["two devices of two"][0]
    without = [dataclasses.replace(row, waits=()) for row in rows]
    dumb = [dataclasses.replace(row, signals=row.signals[:1]) for row in rows]
    for table in (without, dumb, rows[::-1]):
        assert run_adversarially(table, 0)
        assert validate(table)


@pytest.mark.parametrize(("tokens", "devices"), [(1, 1), (4, 8), (8, 8), (16, 1)])
def test_weights_are_those_of_the_plan(tokens, devices):
    """Bytes that a device reads, within 2 % of the planner's formula, where tokens choose experts evenly."""
    config = preset("mimo-v2.5-pro")
    read = collections.Counter()
    for row in assigned(target_of(config), tokens, devices, 1):
        if row.weights and row.worker[0] == 0:
            read[row.of] += row.weights * PUBLISHED_BYTES[row.of]
    plan = Plan(config, PUBLISHED, drafter_preset("mimo-v2.5-pro"), MeshShape(tensor=devices), cache_itemsize=2)
    expected = round_reads(plan, tokens, 1, draft=False)
    listed = min(config.num_experts, tokens * config.experts_per_token)  # as if all tokens chose other experts
    evenly = distinct_experts(config, tokens) / listed
    assert (read[Kind.EXPERT_GATE_UP] + read[Kind.EXPERT_DOWN]) * evenly == pytest.approx(expected["experts"], rel=0.02)
    assert read[Kind.QKV] == pytest.approx(expected["QKV"], rel=0.02)
    assert read[Kind.OUTPUT] == pytest.approx(expected["o_proj"], rel=0.02)
    assert read[Kind.GATE_UP] + read[Kind.DOWN] == pytest.approx(expected["dense MLP"], rel=0.02)
    assert read[Kind.HEAD] == pytest.approx(expected["head"], rel=0.02)
    assert read[Kind.ROUTER] == pytest.approx(expected["router"] * devices, rel=0.02)  # whole on each device


def test_native_code_gets_every_row():
    """A row of numbers each, in the table's order; the first waits for nothing."""
    rows = claimed_rows(step_phases(target_of(preset("mimo-tiny")), 8))
    table = encode(rows)
    assert table.shape == (len(rows), len(COLUMNS)) and table.dtype == np.int32
    assert table[0, COLUMNS.index("wait")] == -1
    assert [Kind(kind) for kind in table[:, 0]] == [row.kind for row in rows]
