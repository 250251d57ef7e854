"""The whole round, as every role of every CTA runs it: in NumPy, with a thread for each, beside the Flax modules."""

import dataclasses
import itertools
from functools import cache

import jax
import numpy as np
import pytest

from mimo_jax.config.geometry import target_of
from mimo_jax.layouts import persistent
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.cache import init_cache
from mimo_jax.weights import expand
from pallas_kernels.decode_step.assigned import shard_of
from pallas_kernels.decode_step.hopper import state
from pallas_kernels.decode_step.hopper.plan import StepPlan
from pallas_kernels.decode_step.hopper.table import table_of
from tests.kernels.decode_step.hopper import threads
from tests.tiny import in_format, random_params, random_tokens, tiny_config

pytestmark = pytest.mark.usefixtures("unchecked")  # a tile is many thousand calls
CONFIG = tiny_config(
    hidden_size=64,
    layer_pattern=(0, 1),
    moe_pattern=(0, 1),
    num_experts=4,
    moe_intermediate_size=256,
    intermediate_size=64,
    sliding_window=20,
    init_range=0.2,
)
FORMAT = "mxfp4"
LENGTHS = (8, 8, 5, 8, 8)  # of the steps of a text, real tokens each; the ring of 32 positions turns round
AUX = (0, 1)


WIDE = dataclasses.replace(CONFIG, moe_intermediate_size=512)  # for two devices


@cache
def params(config=CONFIG):
    """As files hold them: QKV and the dense MLP in FP8, experts in MXFP4."""
    return in_format(config, random_params(config), FORMAT)


@cache
def text():
    return random_tokens(CONFIG, 1, sum(LENGTHS), seed=1)[0]


@cache
def expected(config=CONFIG):
    """Logits, final and auxiliary hidden states of all tokens in float32, and expert counts of each step."""
    step = jax.jit(Backbone(config, AUX).apply)
    cache, start, found = init_cache(config, 1, 64), 0, []
    for count in LENGTHS:
        tokens = np.zeros((1, 8), np.int32)
        tokens[0, :count] = text()[start : start + count]
        logits, features, cache = step({"params": expand(params(config))}, tokens, cache, np.array([count]))
        arrays = (logits, features.hidden, features.aux)
        found.append((*(np.asarray(array)[0, :count] for array in arrays), np.asarray(features.expert_counts)))
        start += count
    return found


class Run:
    """Devices with weights, and buffers of which nothing is known but that padding and caches begin as zeros."""

    def __init__(self, tokens=8, config=CONFIG, devices=1, ctas=4, **options) -> None:
        target = shard_of(target_of(config), devices)
        formats = persistent.formats_of(params(config))
        self.plan = StepPlan(target, formats, tokens, 64, AUX, devices=devices, ctas=ctas)
        self.table, self.starts = table_of(self.plan)
        self.weights = [persistent.pack(config, params(config), self.plan, rank) for rank in range(devices)]
        self.devices = [self.blank() for _ in range(devices)]
        self.options, self.length = options, 0

    def blank(self):
        shapes = state.buffer_shapes(self.plan)
        zeros = {"stream", "attended", "hidden", "caches", "counts", "fault"}
        buffers = {f.name: getattr(shapes, f.name) for f in dataclasses.fields(shapes) if f.name != "times"}

        def fill(name, shape):
            if name in zeros:
                return np.zeros(shape.shape, shape.dtype)
            return np.full(shape.shape, np.nan if shape.dtype == np.float32 else -1, shape.dtype)

        return type(shapes)(
            **{
                name: tuple(fill(name, shape) for shape in held) if isinstance(held, tuple) else fill(name, held)
                for name, held in buffers.items()
            }
        )

    def step(self, tokens: np.ndarray, starts=(0,)):
        """Reads tokens; returns logits, hidden states and expert counts of the first device."""
        count = len(tokens)
        padded = np.full(8, 10**6, np.int32)  # what stands for padding is no token
        padded[:count] = tokens
        for first, end in itertools.pairwise((*starts, self.table.shape[1])):
            scalars = [self.length, count, first, end]
            threads.run(self.plan, self.table, scalars, padded, self.weights, self.devices, **self.options)
        self.length += count
        return self.found(0, count)

    def found(self, rank: int, count: int):
        held, plan = self.devices[rank], self.plan
        rows = [array.reshape(plan.columns, -1)[:count].copy() for array in (held.logits, held.last, held.aux)]
        return *rows, held.expert_counts.reshape(-1, plan.target.experts).copy()


def near(ours, theirs) -> None:
    """Nearer than the modules in bf16 come on this text, 6 % where they choose the same experts."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.05 * np.abs(theirs).max())


def test_it_is_the_flax_step():
    """Four steps of one text, one of them partly padding: logits, hidden states, expert counts, the most likely token.

    Whatever the buffers held, and however long copies took. No wait has given up.
    """
    run, start = Run(delay=0.002), 0
    for count, want in zip(LENGTHS, expected()):
        found = run.step(text()[start : start + count])
        for ours, theirs in zip(found[:3], want[:3]):
            near(ours, theirs)
        np.testing.assert_array_equal(found[3], want[3])
        np.testing.assert_array_equal(run.devices[0].best[:count], np.argmax(found[0], axis=-1))
        assert not run.devices[0].fault.any()
        start += count


def test_a_token_has_the_same_bits_in_any_block():
    """Eight tokens after others by a kernel for eight, the first of them by kernels for four and for one."""
    whole = Run()
    whole.step(text()[:8])
    caches = [held.copy() for held in whole.devices[0].caches]
    expected = whole.step(text()[8:16])
    for tokens, steps in ((4, 1), (1, 2)):
        run, rows = Run(tokens), []
        for empty, filled in zip(run.devices[0].caches, caches):
            empty[:] = filled
        run.length = 8
        for start in range(8, 8 + tokens * steps, tokens):
            rows.append(run.step(text()[start : start + tokens])[:2])
        for ours, theirs in zip(map(np.concatenate, zip(*rows)), expected):
            np.testing.assert_array_equal(ours, theirs[: tokens * steps])


def test_two_devices_share_a_model():
    """Their sums are added in the order of ranks: the same bits on both; near the Flax step."""
    run = Run(config=WIDE, devices=2, delay=0.001)
    run.step(text()[:8])
    run.step(text()[8:16])
    (first, *one), (second, *other) = (run.found(rank, 8) for rank in range(2))
    for ours, theirs in zip(one, other):
        np.testing.assert_array_equal(ours, theirs)
    logits, hidden, _, counts = expected(WIDE)[1]
    near(np.concatenate([first, second], axis=1), logits)
    near(one[0], hidden)
    np.testing.assert_array_equal(one[2], counts)


def test_a_round_may_be_several_launches():
    """One for each layer, and one for the head: the same bits, counters and all."""
    whole, parts = Run(), Run()
    assert len(parts.starts) == len(CONFIG.layer_pattern) + 1
    for start in (0, 8):
        expected = whole.step(text()[start : start + 8])
        found = parts.step(text()[start : start + 8], parts.starts)
        np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(parts.devices[0].counts, whole.devices[0].counts)


def test_the_split_over_ctas_changes_little():
    """Five CTAs, of which one owns no columns; sums of squares are split differently, nothing else."""
    near(Run(ctas=5).step(text()[:8])[0], expected()[0][0])
