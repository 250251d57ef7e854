"""The persistent kernel as a step, its launches emulated: what the loop needs of a step, beside the Flax modules."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from mimo_jax.decode import persistent_step
from mimo_jax.decode.persistent_step import step_of
from mimo_jax.decode.step import FlaxStep
from mimo_jax.errors import UserError
from mimo_jax.layouts import for_device, persistent
from mimo_jax.weights import MxTensor, expand
from tests.kernels.decode_step.hopper import threads
from tests.kernels.decode_step.hopper.test_program import CONFIG, near, params
from tests.tiny import random_tokens

pytestmark = pytest.mark.usefixtures("unchecked")  # a tile is many thousand calls
AUX, CTAS = (0, -1), 4


def emulated(plan, table, step, tokens, weights, buffers):
    """As `persistent.launch`, by a call of the host."""

    def launch(*arrays):
        table, step, tokens, weights, buffers = jax.tree.map(np.array, arrays)
        threads.run(plan, table, step.tolist(), tokens, [weights], [buffers])
        return buffers

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), buffers)
    return jax.pure_callback(launch, shapes, table, step, tokens, weights, buffers)


@pytest.fixture
def step(monkeypatch):
    """A step on few CTAs, and its parameters."""
    monkeypatch.setattr(persistent_step.persistent, "launch", emulated)
    small = partial(persistent.plan_of, ctas=CTAS)
    for module in (persistent, persistent_step):
        monkeypatch.setattr(module, "plan_of", small)
    name, config, packed = for_device(CONFIG, params(), layout="persistent")
    assert name == "persistent"
    return step_of(config, packed, AUX), packed


def test_scales_beyond_float32_are_refused():
    """By stack and value: the kernel's scales are exponents of float32, over what inputs are multiplied by."""

    def enlarged(leaf):
        if not isinstance(leaf, MxTensor):
            return leaf
        scales = np.array(leaf.scales)
        scales.flat[-1] = 193
        return dataclasses.replace(leaf, scales=scales)

    broken = jax.tree.map(enlarged, params(), is_leaf=lambda leaf: isinstance(leaf, MxTensor))
    with pytest.raises(UserError, match="gate: scale byte 193 is above 192"):
        for_device(CONFIG, broken, layout="persistent")


def test_two_rows_in_pieces(step):
    """Blocks, longer pieces, single tokens, and rows that have nothing to read: near the modules in float32."""
    ours, packed = step
    theirs, plain = FlaxStep(CONFIG, AUX), expand(params())
    read = jax.jit(theirs, static_argnums=4)
    cache, wanted = ours.init_cache(2, 32), theirs.init_cache(2, 32)
    assert cache.capacity == 32
    tokens, starts = random_tokens(CONFIG, 2, 24, seed=2), np.zeros(2, np.int32)
    for size, counts, shown in ((10, (9, 3), "last"), (1, (1, 0), "all")):
        piece = np.stack([row[start : start + size] for row, start in zip(tokens, starts)])
        counts = np.array(counts, np.int32)
        found, features, cache = ours(packed, piece, cache, counts, shown)
        logits, expected, wanted = read(plain, piece, wanted, counts, shown)
        for row, count in enumerate(counts):
            if not count:
                continue
            near(found[row], logits[row])
            np.testing.assert_array_equal(features.best[row], np.argmax(found[row], -1))
            for name in ("hidden", "aux"):
                near(getattr(features, name)[row, :count], getattr(expected, name)[row, :count])
        np.testing.assert_array_equal(features.expert_counts, expected.expert_counts)
        starts += counts
        np.testing.assert_array_equal(cache.lengths, starts)


def test_longer_blocks_are_refused(step):
    """They could not be taken back."""
    ours, packed = step
    with pytest.raises(UserError, match="verifies at most 8 tokens, not 9"):
        ours(packed, np.zeros((1, 9), np.int32), ours.init_cache(1, 32), np.array([9]))


def test_what_it_cannot_serve_is_named():
    """A named layout is never replaced by another one."""
    narrow = dataclasses.replace(CONFIG, moe_intermediate_size=32)
    with pytest.raises(UserError, match="an expert's 32 features on a device must be a multiple of 256"):
        for_device(narrow, params(narrow), layout="persistent")
    with pytest.raises(UserError, match="one device"):
        for_device(CONFIG, params(), mesh=jax.make_mesh((1,), ("tensor",)), layout="persistent")
