"""Routing and greedy choice against float64 and `jax.lax.top_k`, by emulation; and as machine code for an H200."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.decode_step.hopper import picking, routing
from pallas_kernels.decode_step.hopper.config import INPUT_SHIFT, PAGE_GAP, SLOT_WORDS
from pallas_kernels.decode_step.hopper.routing import Router
from pallas_kernels.lanes import emulated
from tests.kernels.decode_step.hopper.tile_tools import GLOBAL, MOST_REGISTERS, SHARED, machine_code
from tests.kernels.triton_tools import needs_compiler

GARBAGE = np.float32("nan")
PRO = Router(384, 6144, 132)
LARGEST = np.finfo(np.float32).max


def blank(*shape: int) -> np.ndarray:
    return np.full(shape, GARBAGE, np.float32)


def bf16(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(ml_dtypes.bfloat16)


def scores_of(router: Router, weights: np.ndarray, x: np.ndarray, factors: np.ndarray, ctas) -> np.ndarray:
    """Scores [tokens, experts] of these CTAs' experts, NaN elsewhere; the page holds one part, in its second half."""
    tokens, packed = len(x), routing.pack_router(weights, router)
    part_words, scores = router.columns.part_cols // 2 + PAGE_GAP, blank(tokens, router.experts)
    words = np.zeros((tokens, router.cols // 2), np.int32)
    words[:, : router.width // 2] = (x * ml_dtypes.bfloat16(2.0 ** INPUT_SHIFT["mxfp4"])).view(np.int32)
    for cta in ctas:
        sums = blank(router.sums(tokens))
        for chunk in range(router.columns.chunks):
            part, inside = divmod(chunk, router.columns.part_chunks)
            page = np.full((2, tokens, part_words), -1, np.int32)
            page[1, :, :-PAGE_GAP] = words.reshape(tokens, -1, router.columns.part_cols // 2)[:, part]
            first = tokens * part_words + inside * router.columns.chunk_cols // 2
            tile = routing.multiply_router(router, tokens)
            scalars = {"team": chunk % 4, "first": first, "is_first": int(chunk < 4)}
            emulated.run(tile, (packed[cta, chunk], page, sums), scalars)
        emulated.run(routing.score(router, tokens), (sums, factors, scores), {"cta": cta})
    return scores


def sample(router: Router, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Router weights, inputs, factors; logits are of the size of one."""
    rng = np.random.default_rng(1)
    weights = (rng.standard_normal((router.experts, router.width)) / router.width**0.5).astype(np.float32)
    return weights, bf16((16, router.width), 2)[:tokens], rng.uniform(0.5, 2, 16).astype(np.float32)[:tokens]


def rests(weights: np.ndarray):
    """What bf16 leaves of float32 numbers, and of that again."""
    first = weights - weights.astype(ml_dtypes.bfloat16).astype(np.float32)
    return first, first - first.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("router", [PRO, Router(256, 4096, 132), Router(10, 1000, 4), Router(3, 512, 5)])
def test_packed_weights_are_an_image(router):
    """Every weight is in a slot once, none is changed, and a slot of the ring has room for them."""
    weights = sample(router, 8)[0]
    packed = routing.pack_router(weights, router)
    assert packed.shape == (router.ctas, router.columns.chunks, router.slot_words) and router.slot_words <= SLOT_WORDS
    np.testing.assert_array_equal(routing.unpack_router(packed, router), weights)
    pieces = np.count_nonzero(weights) + sum(np.count_nonzero(rest) for rest in rests(weights))
    assert np.count_nonzero(packed.view(ml_dtypes.bfloat16)) == pieces
    np.testing.assert_array_equal(routing.pack_router(jnp.asarray(weights), router), packed)


@pytest.mark.parametrize(
    ("router", "ctas", "tokens"),
    [(PRO, (0, 77, 131), 16), (PRO, (10,), 8), (Router(10, 1000, 4), range(4), 8), (Router(256, 4096, 132), (5,), 16)],
)
def test_scores_are_those_of_float64(router, ctas, tokens):
    """Sigmoids of float32 logits of 6,144 products, as close as what XLA makes of a float32 matrix product."""
    weights, x, factors = sample(router, tokens)
    found = scores_of(router, weights, x, factors, ctas)
    logits = (x.astype(np.float64) @ weights.T.astype(np.float64)) * factors[:, None]
    bounds = router.bounds()
    own = np.concatenate([np.arange(bounds[cta], bounds[cta + 1]) for cta in ctas])
    np.testing.assert_allclose(found[:, own], 1 / (1 + np.exp(-logits))[:, own], rtol=8e-7)
    assert np.isnan(np.delete(found, own, axis=1)).all()


def test_large_logits_saturate():
    """Sigmoids of logits of a thousand are 0 and 1, not NaN."""
    router = Router(2, 512, 1)
    weights = np.array([[2.0], [-2.0]], np.float32) * np.ones((2, 512), np.float32)
    found = scores_of(router, weights, np.ones((8, 512), ml_dtypes.bfloat16), np.ones(8, np.float32), [0])
    np.testing.assert_array_equal(found, [[1, 0]] * 8)


def test_a_score_does_not_depend_on_others():
    """The same bits alone among 8 tokens and among 16; other tokens are NaN, and stay among themselves."""
    weights, x, factors = sample(PRO, 16)
    alone = x[:8].copy()
    alone[1:] = GARBAGE
    few = scores_of(PRO, weights, alone, factors[:8], [7])
    many = scores_of(PRO, weights, x, factors, [7])
    own = slice(*PRO.bounds()[7:9])
    np.testing.assert_array_equal(few[0, own], many[0, own])
    assert np.isnan(few[1:, own]).all()


def choose(scores: np.ndarray, bias: np.ndarray, chosen: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, experts = scores.shape
    ids, weights = np.full((tokens, chosen), -1, np.int32), blank(tokens, chosen)
    stacked = np.stack([blank(experts), bias])
    for team in range(4):
        scalars = {"team": team, "count": count, "bias_first": experts}
        emulated.run(routing.top_k(experts, chosen, tokens), (scores, stacked, ids, weights), scalars)
    return ids, weights


def hard_scores(tokens: int, experts: int) -> np.ndarray:
    """Random; many equal; all equal; both zeros; the extremes of float32; all negative."""
    rng = np.random.default_rng(3)
    rows = rng.uniform(0, 1, (tokens, experts)).astype(np.float32)
    rows[1] = rng.integers(0, 3, experts)
    rows[2] = 0.5
    rows[3] = rng.choice(np.array([0.0, -0.0], np.float32), experts)
    rows[4] = rng.choice(np.array([LARGEST, -LARGEST, 1e-45, -1e-45, np.inf, -np.inf], np.float32), experts)
    rows[5] = -rows[0]
    return rows


@pytest.mark.parametrize(("tokens", "count"), [(8, 8), (16, 13)])
@pytest.mark.parametrize(("experts", "chosen"), [(384, 8), (256, 8), (37, 6), (10, 2), (1, 1)])
def test_top_k_is_that_of_jax(experts, chosen, tokens, count):
    """Ids equal `jax.lax.top_k`'s, ties and extremes included; the bias selects and does not weigh; padding is none."""
    scores = hard_scores(tokens, experts)
    for bias in (np.zeros(experts, np.float32), np.random.default_rng(4).normal(0, 0.1, experts).astype(np.float32)):
        ids, weights = choose(scores, bias, chosen, count)
        expected = np.asarray(jax.lax.top_k(scores + bias, chosen)[1])
        np.testing.assert_array_equal(ids[:count], expected[:count])
        finite = [0, 1, 2]
        picked = np.take_along_axis(scores, expected, axis=1)[finite].astype(np.float64)
        np.testing.assert_allclose(weights[finite], picked / (picked.sum(axis=1, keepdims=True) + 1e-20), rtol=4e-7)
        assert (ids[count:] == experts).all() and not weights[count:].any()


def test_a_choice_does_not_depend_on_others():
    """A token's ids and the bits of its weights are the same among 8 and among 16."""
    scores, bias = np.random.default_rng(5).uniform(0, 1, (16, 384)).astype(np.float32), np.zeros(384, np.float32)
    few, many = choose(scores[:8].copy(), bias, 8, 1), choose(scores, bias, 8, 16)
    for name in range(2):
        np.testing.assert_array_equal(few[name][0], many[name][0])


@pytest.mark.parametrize(
    ("experts", "chosen", "tokens", "count", "few"),
    [
        (384, 8, 16, 16, 384),
        (384, 8, 8, 5, 20),
        (37, 6, 16, 16, 37),
        (10, 2, 8, 1, 10),
        (384, 8, 8, 0, 384),
        (1, 1, 8, 8, 1),
    ],
)
def test_active_experts_are_listed(experts, chosen, tokens, count, few):
    """Ascending, each once, with the pair of every token that chose it; and their number, beside other layers'."""
    rng, nobody = np.random.default_rng(6), np.int32(experts)
    ids = np.stack([rng.permutation(few)[:chosen] for _ in range(tokens)]).astype(np.int32)
    ids[count:] = nobody
    most = min(experts, tokens * chosen)
    scratch = np.full(routing.list_scratch(experts), -1, np.int32)
    active, listed, number = np.full(most, -7, np.int32), np.full((most, tokens), -7, np.int32), np.zeros(1, np.int32)
    seen = np.full(128, -1, np.int32)

    def tile(lanes, memories, scalars):
        """And every thread reads at once what another one has written."""
        routing.list_experts(experts, chosen, tokens)(lanes, memories[:-1], scalars)
        lanes.store([lanes.load_one(memories[2], lanes.thread * 0, "i32")], memories[-1], lanes.thread)

    emulated.run(tile, (ids, scratch, active, number, listed, seen))
    assert (seen == active[0]).all()
    expected = np.unique(ids[:count])
    assert number[0] == len(expected)
    np.testing.assert_array_equal(active[: len(expected)], expected)
    pairs = np.full((most, tokens), -1)
    for token, choice in np.ndindex(count, chosen):
        pairs[np.searchsorted(expected, ids[token, choice]), token] = token * chosen + choice
    np.testing.assert_array_equal(listed, pairs)
    counts = np.full((2, experts), -7, np.int32)
    tile = routing.count_experts(experts, chosen, tokens)
    emulated.run(tile, (active, number, listed, counts), {"counts_first": experts})
    np.testing.assert_array_equal(counts[1], np.bincount(ids[:count].ravel(), minlength=experts))
    assert (counts[0] == -7).all()


def pick(logits: np.ndarray, ctas: int) -> tuple[np.ndarray, np.ndarray]:
    """By CTAs of about equal shares."""
    tokens, vocab = logits.shape
    candidates, best, values = np.full((ctas, 2, tokens), -1, np.int32), np.full(tokens, -1, np.int32), blank(tokens)
    for cta in range(ctas):
        scalars = {"cta": cta, "first": cta * vocab // ctas, "last": (cta + 1) * vocab // ctas}
        emulated.run(picking.pick_part(vocab, tokens), (logits, candidates), scalars)
    emulated.run(picking.pick_all(ctas, tokens), (candidates, best, values))
    return best, values


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(("vocab", "ctas"), [(1000, 7), (97, 13), (5, 9), (2000, 132)])
def test_the_largest_logit_is_picked(vocab, ctas, tokens):
    """The first index of the largest, also where equals, zeros of both signs or infinities lie in several CTAs' shares,
    and where some have no logits."""
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((tokens, vocab)).astype(np.float32)
    logits[1] = rng.integers(0, 3, vocab)
    logits[2] = -np.inf
    logits[3] = rng.choice(np.array([0.0, -0.0], np.float32), vocab)
    logits[4] = rng.choice(np.array([-LARGEST, np.inf, 1e-45], np.float32), vocab)
    logits[5] = -np.abs(logits[0])
    best, values = pick(logits, ctas)
    np.testing.assert_array_equal(best, logits.argmax(axis=1))
    np.testing.assert_array_equal(values, logits.max(axis=1))


def tile_of(name: str, tokens: int) -> tuple:
    """A tile at Pro's sizes, where its memories are and their words, its scalars."""
    sums, pairs, page = PRO.sums(tokens), tokens * 8, 2 * tokens * (PRO.columns.part_cols // 2 + PAGE_GAP)
    lists = [(SHARED, pairs), (SHARED, 1), (SHARED, pairs * tokens)]
    scores, candidates = (GLOBAL, tokens * 384), (GLOBAL, 132 * 2 * tokens)
    return {
        "multiply_router": (
            routing.multiply_router(PRO, tokens),
            [(SHARED, SLOT_WORDS), (SHARED, page), (SHARED, sums)],
            ["team", "first", "is_first"],
        ),
        "score": (routing.score(PRO, tokens), [(SHARED, sums), (SHARED, tokens), scores], ["cta"]),
        "top_k": (
            routing.top_k(384, 8, tokens),
            [scores, (GLOBAL, 384), (SHARED, pairs), (SHARED, pairs)],
            ["team", "count", "bias_first"],
        ),
        "list_experts": (
            routing.list_experts(384, 8, tokens),
            [(SHARED, pairs), (SHARED, routing.list_scratch(384)), *lists],
            [],
        ),
        "count_experts": (routing.count_experts(384, 8, tokens), [*lists, (GLOBAL, 384)], ["counts_first"]),
        "pick_part": (
            picking.pick_part(19072, tokens),
            [(GLOBAL, tokens * 19072), candidates],
            ["cta", "first", "last"],
        ),
        "pick_all": (picking.pick_all(132, tokens), [candidates, (GLOBAL, tokens), (GLOBAL, tokens)], []),
    }[name]


@needs_compiler
@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(
    "name", ["multiply_router", "score", "top_k", "list_experts", "count_experts", "pick_part", "pick_all"]
)
def test_nothing_is_spilled(name, tokens, tmp_path, monkeypatch):
    """At Pro's sizes each tile keeps all state of a thread in the registers it has beside the others."""
    registers, stack, spilled = machine_code(*tile_of(name, tokens), tmp_path, monkeypatch)
    assert stack == spilled == 0 and registers <= MOST_REGISTERS
