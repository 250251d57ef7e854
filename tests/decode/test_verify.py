"""Verification is lossless: shown by enumeration of every block over a small vocabulary, then by counting draws."""

from __future__ import annotations

import collections
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mimo_jax.decode.drafter import confident
from mimo_jax.decode.sampling import Greedy, Sampled, draw
from mimo_jax.decode.verify import RULES, acceptance, draft_keys, verify
from mimo_jax.errors import UserError
from tests.decode.toy_models import KINDS, VOCAB, Model, pair

DRAWS = 200_000


def every_block(drafts: int) -> np.ndarray:
    return np.array(list(itertools.product(range(VOCAB), repeat=drafts)), int)


def along(model: Model, block: np.ndarray) -> np.ndarray:
    """The distributions after the beginnings of one block."""
    return np.stack([table[tuple(block[:k])] for k, table in enumerate(model)])


def probability(model: Model, block: np.ndarray) -> float:
    """How likely `model` is to say `block`."""
    return np.prod([table[tuple(block[: k + 1])] for k, table in enumerate(model[: len(block)])], dtype=np.float64)


def found(rule: str, p: Model, q: Model, counts=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `acceptance` says for every block: thresholds, distributions of the accepted count, distributions of the
    following token. Of each block only the first `counts` drafts are proposed.
    """
    blocks = every_block(len(q))
    p_BNC, q_BMC = (np.stack([along(model, block) for block in blocks]) for model in (p, q))
    h_BM, following_BNC = (np.asarray(x, np.float64) for x in acceptance(rule, p_BNC, q_BMC, blocks, counts))
    assert np.isfinite(h_BM).all() and (0 <= h_BM).all() and (h_BM <= 1).all()
    np.testing.assert_allclose(following_BNC.sum(-1), 1, atol=1e-6)
    accepted_BN = [[count_probability(rule, h_M, count, len(q)) for count in range(len(q) + 1)] for h_M in h_BM]
    return h_BM, np.array(accepted_BN), following_BNC


def count_probability(rule: str, h_M: np.ndarray, count: int, drafts: int) -> float:
    """That exactly `count` drafts are accepted when draft i passes, by itself, with probability h_i."""
    if rule == "token":
        return np.prod(h_M[:count]) * (1 - h_M[count] if count < drafts else 1)
    return (h_M[count - 1] if count else 1) * np.prod(1 - h_M[count:])


def published(rule: str, p_NC: np.ndarray, q_MC: np.ndarray, block: np.ndarray) -> np.ndarray:
    """The papers' algorithms for one block, in float64: the joint distribution of the accepted count and the following
    token.
    """
    p_NC, q_MC, drafts = p_NC.astype(np.float64), q_MC.astype(np.float64), len(block)
    distribution = np.zeros((drafts + 1, VOCAB))
    if rule == "token":
        going = 1.0
        for i, x in enumerate(block):
            accept = min(1.0, p_NC[i, x] / q_MC[i, x])
            distribution[i] = going * (1 - accept) * share(np.maximum(p_NC[i] - q_MC[i], 0))
            going *= accept
        distribution[drafts] = going * p_NC[drafts]
        return distribution
    reach = [1.0]
    for i, x in enumerate(block):
        reach.append(min(reach[i] * p_NC[i, x] / q_MC[i, x], 1.0))
    going = 1.0  # the longest count is tried first
    distribution[drafts] = reach[drafts] * p_NC[drafts]
    going -= reach[drafts]
    for i in range(drafts - 1, -1, -1):
        residual = np.maximum(reach[i] * p_NC[i] - q_MC[i], 0)
        room = residual.sum() + 1 - reach[i]
        accept = 1.0 if i == 0 else residual.sum() / room if room else 0.0
        distribution[i] = going * accept * share(residual)
        going *= 1 - accept
    return distribution


def share(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum() if weights.sum() else weights


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_emitted_tokens_have_the_law_of_the_target(rule, kind, drafts):
    """Accepted drafts, the token after them, then the target by itself: jointly what the target would have said."""
    for seed in range(3):
        p, q = pair(kind, drafts, seed)
        check_law(p, q, found(rule, p, q))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_block_may_end_early(rule, kind):
    """After any draft, as long as only the drafts before decide so: the law is the target's all the same."""
    drafts = 3
    for seed in range(3):
        p, q = pair(kind, drafts, seed)
        counts = [
            next((k for k in range(drafts) if (sum(block[:k]) + seed) % VOCAB == 2), drafts)
            for block in every_block(drafts)
        ]
        result = found(rule, p, q, np.array(counts, np.int32))
        assert all(accepted_N[count + 1 :].sum() == 0 for accepted_N, count in zip(result[1], counts))
        check_law(p, q, result)


@pytest.mark.parametrize("rule", RULES)
def test_a_block_may_end_where_the_drafter_is_unsure(rule):
    """The drafter's confidence, at every degree that makes a difference, leaves the law the target's."""
    lengths = set()
    for kind, seed, confidence in itertools.product(KINDS, range(3), (0.15, 0.3, 0.5, 0.7)):
        p, q = pair(kind, 3, seed)
        likely_BM = np.stack([along(q, block).max(axis=-1) for block in every_block(3)])
        counts = np.asarray(confident(likely_BM, confidence), np.int32)
        check_law(p, q, found(rule, p, q, counts))
        lengths |= set(counts.tolist())
    assert lengths == {0, 1, 2, 3}


def check_law(p: Model, q: Model, result: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    drafts, (_, accepted_BN, following_BNC) = len(q), result
    beginnings: collections.defaultdict[tuple[int, ...], float] = collections.defaultdict(float)
    for block, accepted_N, following_NC in zip(every_block(drafts), accepted_BN, following_BNC):
        drafted = probability(q, block)
        for count, token in itertools.product(range(drafts + 1), range(VOCAB)):
            beginning = (*block[:count], token)
            beginnings[beginning] += drafted * accepted_N[count] * following_NC[count, token]
    for text in itertools.product(range(VOCAB), repeat=drafts + 1):
        emitted = sum(
            mass * np.prod([p[k][text[: k + 1]] for k in range(len(beginning), drafts + 1)])
            for beginning, mass in beginnings.items()
            if text[: len(beginning)] == beginning
        )
        assert emitted == pytest.approx(probability(p, text), abs=1e-6)


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_each_block_is_treated_as_published(rule, kind, drafts):
    """After every block that can be drafted, count and following token have the joint distribution of the published
    rule.
    """
    p, q = pair(kind, drafts)
    _, accepted_BN, following_BNC = found(rule, p, q)
    for block, accepted_N, following_NC in zip(every_block(drafts), accepted_BN, following_BNC):
        if drafted := probability(q, block):
            want = published(rule, along(p, block), along(q, block), block)
            np.testing.assert_allclose(drafted * accepted_N[:, None] * following_NC, drafted * want, atol=1e-6)


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_expected_lengths(kind, drafts):
    """A draft is accepted with probability sum(min(p, q)) by "token"; "block" never accepts fewer on average."""
    p, q = pair(kind, drafts)
    blocks, lengths = every_block(drafts), {}
    drafted_B = np.array([probability(q, block) for block in blocks])
    for rule in RULES:
        lengths[rule] = drafted_B @ found(rule, p, q)[1] @ np.arange(drafts + 1)
    assert lengths["block"] >= lengths["token"] - 1e-6
    thresholds_BM = found("token", p, q)[0]
    for k in range(drafts):
        for history in itertools.product(range(VOCAB), repeat=k):
            rows = [[*history, token] + [0] * (drafts - k - 1) for token in range(VOCAB)]
            index = [int(np.flatnonzero((blocks == row).all(1))[0]) for row in rows]
            rate = q[k][history] @ thresholds_BM[index, k]
            assert rate == pytest.approx(np.minimum(p[k][history], q[k][history]).sum(), abs=1e-6)


def test_block_is_strictly_better_somewhere():
    """On random pairs of models the two rules are not the same rule."""
    p, q = pair("random", 3)
    drafted_B = [probability(q, block) for block in every_block(3)]
    token, block = (drafted_B @ found(rule, p, q)[1] @ np.arange(4) for rule in RULES)
    assert block > token + 0.05


@partial(jax.jit, static_argnames=("rule", "is_drawn"))
def play(rule: str, p: Model, q: Model, is_drawn: bool, keys_B) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Drafts, accepted counts and following tokens, with the keys that the decoding loop would use."""
    wide_BC = jnp.zeros((len(keys_B), VOCAB))
    drafts, distributions = [], []
    for k, table in enumerate(q):
        distributions.append(table[tuple(drafts)] + wide_BC)
        drafts.append(draw(Sampled(), jnp.log(distributions[k]), draft_keys(keys_B, k)))
    p_BNC = jnp.stack([table[tuple(drafts[:k])] + wide_BC for k, table in enumerate(p)], axis=1)
    drafts_BM, q_BMC = jnp.stack(drafts, axis=1), jnp.stack(distributions, axis=1)
    return drafts_BM, *verify(Sampled(), rule, jnp.log(p_BNC), drafts_BM, q_BMC if is_drawn else None, keys_B)


def pvalue(seen: np.ndarray, distribution: np.ndarray) -> float:
    """Of a chi-square test; outcomes expected fewer than five times are counted together."""
    assert seen[distribution == 0].sum() == 0
    order = np.argsort(-distribution, axis=None)
    counts, want = list(seen.ravel()[order]), list(distribution.ravel()[order] * seen.sum() / distribution.sum())
    while want[-1] < 5:
        counts[-2:], want[-2:] = [sum(counts[-2:])], [sum(want[-2:])]
    if len(want) == 1:
        return 1.0
    return stats.chisquare(counts, want).pvalue


@pytest.mark.parametrize(
    ("kind", "is_drawn"),
    [
        ("random", True),
        ("equal", True),
        ("disjoint", True),
        ("zeros in both", True),
        ("certain target", True),
        ("certain drafts", False),
        ("both certain", False),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_draws_have_the_published_law(rule, kind, is_drawn):
    """200,000 rows: (drafts, count, token) as published, the text as the target's; the impossible never happens."""
    drafts = 3
    p, q = pair(kind, drafts, seed=5)
    keys_B = jax.random.split(jax.random.key(11), DRAWS)
    drafts_BM, accepted_B, next_B = (np.asarray(x) for x in play(rule, p, q, is_drawn, keys_B))

    distribution = np.zeros((VOCAB,) * drafts + (drafts + 1, VOCAB))
    for block in every_block(drafts):
        if drafted := probability(q, block):
            distribution[tuple(block)] = drafted * published(rule, along(p, block), along(q, block), block)
    seen = np.zeros(distribution.shape, int)
    np.add.at(seen, (*drafts_BM.T, accepted_B, next_B), 1)
    assert pvalue(seen, np.where(distribution < 1e-9, 0, distribution)) > 1e-4  # float64 leaves crumbs where p = q

    texts = np.zeros((VOCAB,) * (drafts + 1), int)
    np.add.at(texts, tuple(continued(p, drafts_BM, accepted_B, next_B).T), 1)
    want = np.reshape([probability(p, text) for text in every_block(drafts + 1)], texts.shape)
    assert pvalue(texts, want) > 1e-4


def continued(p: Model, drafts_BM: np.ndarray, accepted_B: np.ndarray, next_B: np.ndarray) -> np.ndarray:
    """What each row emitted, and then what the target says, up to one token more than was drafted."""
    rng, columns = np.random.default_rng(3), []
    for k, table in enumerate(p):
        cumulative = np.cumsum(table[tuple(columns)] + np.zeros((len(next_B), 1)), axis=-1)
        own_B = (rng.random((len(next_B), 1)) * cumulative[:, -1:] >= cumulative).sum(-1)
        draft_B = drafts_BM[:, min(k, drafts_BM.shape[1] - 1)]
        columns.append(np.where(k < accepted_B, draft_B, np.where(k == accepted_B, next_B, own_B)))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("u", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_the_ends_of_the_unit_interval(monkeypatch, rule, u):
    """Whatever the uniform numbers are, impossible drafts are rejected and drafts of the target's own distribution
    accepted.
    """
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, u))
    for seed in range(10):
        blocks = every_block(3)
        keys_B = jax.random.split(jax.random.key(seed), len(blocks))
        p, q = pair("zeros in both", 3, seed)
        p_BNC, q_BMC = (np.stack([along(model, block) for block in blocks]) for model in (p, q))
        accepted_B, next_B = verify(Sampled(), rule, jnp.log(p_BNC), blocks, q_BMC, keys_B)
        for block, count, token in zip(blocks, accepted_B, next_B):
            assert probability(p, (*block[:count], token)) > 0
        possible = [probability(p[:3], block) > 0 for block in blocks]
        accepted_B, _ = verify(Sampled(), rule, jnp.log(p_BNC), blocks, jax.nn.softmax(jnp.log(p_BNC[:, :3])), keys_B)
        assert (np.asarray(accepted_B) == 3)[possible].all()


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
def test_greedy_accepts_the_drafts_that_greedy_would_say(drafts):
    """Every draft against every text: stops at the first difference, or where no more is proposed, and goes on with the
    target's token there.
    """
    for best in every_block(drafts + 1):
        blocks = every_block(drafts)
        logits_BNC = np.broadcast_to(np.eye(VOCAB)[best], (len(blocks), drafts + 1, VOCAB))
        keys_B = jax.random.split(jax.random.key(0), len(blocks))
        proposed = np.arange(len(blocks), dtype=np.int32) % (drafts + 1)
        for counts_B in (None, proposed):
            accepted_B, next_B = verify(Greedy(), "block", logits_BNC, blocks, None, keys_B, counts_B=counts_B)
            most_B = np.full(len(blocks), drafts) if counts_B is None else counts_B
            for block, most, count, token in zip(blocks, most_B, accepted_B, next_B):
                assert count == sum(1 for _ in itertools.takewhile(lambda k: block[k] == best[k], range(most)))  # noqa: B023
                assert token == best[count]


STRATEGIES = [Greedy(), Sampled(0.7), Sampled(1.3, top_k=20, top_p=0.8, min_p=0.02)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_without_drafts_it_is_plain_decoding(rule, strategy):
    """No drafts: the very token that `draw` draws with the same keys."""
    logits_BNC = np.random.default_rng(1).normal(0, 2, (64, 1, 40)).astype(np.float32)
    keys_B = jax.random.split(jax.random.key(2), 64)
    none_BM = jnp.zeros((64, 0), jnp.int32)
    for q_BMC in (None, jnp.zeros((64, 0, 40))):
        accepted_B, next_B = verify(strategy, rule, logits_BNC, none_BM, q_BMC, keys_B)
        assert not accepted_B.any() and accepted_B.dtype == next_B.dtype == jnp.int32
        np.testing.assert_array_equal(next_B, draw(strategy, logits_BNC[:, 0], keys_B))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_rows_do_not_know_of_each_other(rule, strategy):
    """Alone, in another order, or under vmap: each row gets the same answer."""
    rng = np.random.default_rng(4)
    logits_BNC = rng.normal(0, 1, (24, 5, 40)).astype(np.float32)
    q_BMC = np.asarray(jax.nn.softmax(logits_BNC[:, :4] + rng.normal(0, 0.5, (24, 4, 40)).astype(np.float32)))
    drafts_BM = (q_BMC.cumsum(-1) > rng.random((24, 4, 1))).argmax(-1)
    rows = (logits_BNC, drafts_BM, q_BMC, jax.random.split(jax.random.key(5), 24))

    @jax.jit
    def answer(logits_BNC, drafts_BM, q_BMC, keys_B):
        return jnp.stack(verify(strategy, rule, logits_BNC, drafts_BM, q_BMC, keys_B), axis=1)

    together = np.asarray(answer(*rows))
    assert len(np.unique(together[:, 0])) > 1
    np.testing.assert_array_equal(answer(*(x[::-1] for x in rows))[::-1], together)
    np.testing.assert_array_equal([answer(*(x[b : b + 1] for x in rows))[0] for b in range(24)], together)
    np.testing.assert_array_equal(jax.vmap(lambda *row: answer(*(x[None] for x in row))[0])(*rows), together)


@pytest.mark.parametrize("rule", RULES)
def test_drafts_that_were_not_drawn(rule):
    """A draft without a distribution is one from the distribution that is certain of it; alone, it is accepted with
    probability p.
    """
    p, _ = pair("random", 3)
    blocks = every_block(3)
    p_BNC = np.stack([along(p, block) for block in blocks])
    keys_B = jax.random.split(jax.random.key(6), len(blocks))
    answers = [verify(Sampled(), rule, jnp.log(p_BNC), blocks, q, keys_B) for q in (None, np.eye(VOCAB)[blocks])]
    np.testing.assert_array_equal(*answers)
    one_BM = blocks[:, :1]
    h_BM, following_BNC = acceptance(rule, p_BNC[:, :2], np.eye(VOCAB, dtype=np.float32)[one_BM], one_BM)
    p_BC = p_BNC[:, 0]
    np.testing.assert_allclose(h_BM, np.take_along_axis(p_BC, one_BM, axis=1), atol=1e-7)
    rest_BC = np.where(np.arange(VOCAB) == one_BM, 0, p_BC)
    np.testing.assert_allclose(following_BNC[:, 0], rest_BC / rest_BC.sum(-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("is_drawn", [True, False])
@pytest.mark.parametrize("strategy", [Sampled(top_k=2), Sampled(top_p=0.7), Sampled(min_p=0.4)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_nothing_leaves_the_filtered_support(rule, strategy, is_drawn):
    """Each filter keeps the two likeliest of five tokens, 2 to 1; the drafts come from all five."""
    drafts, p_C = 2, np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32)
    kept_C = np.array([2 / 3, 1 / 3, 0, 0, 0])
    shape = (DRAWS // 4, drafts)
    drafts_BM = np.random.default_rng(7).integers(0, 5, shape)
    q_BMC = jnp.full((*shape, 5), 0.2) if is_drawn else None
    logits_BNC = jnp.broadcast_to(jnp.log(p_C), (shape[0], drafts + 1, 5))
    keys_B = jax.random.split(jax.random.key(8), shape[0])
    accepted_B, next_B = verify(strategy, rule, logits_BNC, drafts_BM, q_BMC, keys_B)
    target = [np.broadcast_to(kept_C, (5,) * k + (5,)) for k in range(drafts + 1)]
    texts_BN = continued(target, drafts_BM, np.asarray(accepted_B), np.asarray(next_B))
    seen = np.zeros((5,) * (drafts + 1), int)
    np.add.at(seen, tuple(texts_BN.T), 1)
    assert pvalue(seen, np.einsum("a,b,c->abc", kept_C, kept_C, kept_C)) > 1e-4


@pytest.mark.parametrize("strategy", [Greedy(), Sampled()], ids=str)
def test_unknown_rules_are_named(strategy):
    """An unknown rule is an error that says which rules there are."""
    keys_B = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(UserError, match=r"'typical'.*token, block"):
        verify(strategy, "typical", jnp.zeros((1, 1, 3)), jnp.zeros((1, 0), jnp.int32), None, keys_B)


def test_draft_keys_differ_by_slot_and_row():
    """No two drafts are drawn with the same randomness."""
    keys_B = jax.random.split(jax.random.key(9), 4)
    words = np.concatenate([jax.random.key_data(draft_keys(keys_B, position)) for position in range(7)])
    assert len(np.unique(words, axis=0)) == 28
