"""Sampling strategies draw from the distribution they name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mimo_jax.decode.sampling import Greedy, Sampled, draw, most_likely, probabilities, sample, strategy_of
from mimo_jax.errors import UserError

LOGITS = np.random.default_rng(0).normal(0, 2, (5, 40)).astype(np.float32)


def expected(logits: np.ndarray, temperature: float, top_k=None, top_p=None, min_p=None) -> np.ndarray:
    """The filters restated with sets, in float64, for one row."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    for keep in (
        lambda p: set(np.argsort(-p)[:top_k]) if top_k else set(range(len(p))),
        lambda p: nucleus(p, top_p) if top_p else set(range(len(p))),
        lambda p: {i for i in range(len(p)) if p[i] >= min_p * p.max()} if min_p else set(range(len(p))),
    ):
        kept = keep(p)
        p = np.array([p[i] if i in kept else 0.0 for i in range(len(p))])
        p /= p.sum()
    return p


def nucleus(p: np.ndarray, top_p: float) -> set[int]:
    kept, total = set(), 0.0
    for i in np.argsort(-p):
        kept.add(i)
        total += p[i]
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "min_p": 0.05}]
)
def test_filters_keep_the_documented_sets(temperature, filters):
    """temperature, top-k, top-p, min-p, in that order, against a restatement with sets."""
    found = probabilities(Sampled(temperature, **filters), jnp.asarray(LOGITS))
    want = np.stack([expected(row, temperature, **filters) for row in LOGITS])
    np.testing.assert_allclose(found, want, atol=2e-6)  # float32 softmax against float64


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 1}, 2),  # equal probabilities are never told apart
        ({"top_k": 3}, 4),
        ({"top_k": 99}, 6),
        ({"top_p": 1.0}, 5),  # but what has no probability at all
        ({"top_p": 0.5}, 2),
        ({"top_p": 1e-9}, 2),
        ({"top_k": 3, "top_p": 1.0}, 4),
    ],
)
def test_filters_at_their_edges(filters, kept):
    """Ties at a threshold are kept together, a filter wider than the vocabulary keeps it all."""
    p = np.array([[0.3, 0.15, 0.3, 0.15, 0.1, 0.0]])
    with np.errstate(divide="ignore"):
        found = probabilities(Sampled(1.0, **filters), jnp.asarray(np.log(p), jnp.float32))
    largest = np.sort(p[0])[::-1][:kept]
    assert np.count_nonzero(found) == np.count_nonzero(largest)
    np.testing.assert_allclose(np.sort(found[0])[::-1][:kept], largest / largest.sum(), atol=1e-6)


def test_greedy_is_a_point_mass():
    """Greedy puts everything on the most likely token."""
    np.testing.assert_array_equal(np.argmax(probabilities(Greedy(), LOGITS), -1), LOGITS.argmax(-1))


def test_the_first_of_equal_maxima_is_the_most_likely():
    """`most_likely` is argmax: on random rows, on ties, and with infinities."""
    rows = np.random.default_rng(1).integers(-3, 3, (200, 7)).astype(np.float32)
    rows[:50, :3] = -np.inf
    rows[50] = -np.inf
    np.testing.assert_array_equal(most_likely(jnp.asarray(rows)), rows.argmax(-1))


def test_draws_follow_the_distribution():
    """200,000 draws pass a chi-square test at 1e-6 and never leave the kept set."""
    strategy, count = Sampled(0.8, top_k=12), 200_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (count, 40))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(count))
    seen = np.bincount(np.asarray(draw(strategy, logits, keys)), minlength=40)
    p = expected(LOGITS[0], 0.8, top_k=12)
    assert seen[p == 0].sum() == 0
    assert stats.chisquare(seen[p > 0], count * p[p > 0] / p.sum()).pvalue > 1e-6


def test_draws_from_a_wide_vocabulary_follow_their_weights():
    """`sample` draws a group, then one of it: 300 tokens, a whole group of them and both ends without weight."""
    rng, count = np.random.default_rng(3), 200_000
    weights = rng.random(300).astype(np.float32) ** 3
    weights[[0, 299]] = weights[128:256] = 0
    keys = jax.random.split(jax.random.key(5), count)
    seen = np.bincount(sample(jnp.broadcast_to(weights, (count, 300)), keys), minlength=300)
    assert seen[weights == 0].sum() == 0
    likely = weights > 1e-4
    share = weights[likely].astype(np.float64) / weights[likely].sum(dtype=np.float64)
    assert stats.chisquare(seen[likely], seen[likely].sum() * share).pvalue > 1e-6


@pytest.mark.parametrize("u", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
@pytest.mark.parametrize("size", [40, 128, 1000])
def test_draws_at_the_ends_of_the_unit_interval(monkeypatch, size, u):
    """Whatever the random numbers are, a token without weight is never drawn, rounding of sums included."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, u))
    rng = np.random.default_rng(size)
    weights = np.where(rng.random((500, size)) < 0.05, rng.random((500, size)) ** 8, 0).astype(np.float32)
    weights[:, size // 2] += 1e-30  # no row is empty
    drawn = np.asarray(sample(weights, jax.random.split(jax.random.key(0), 500)))
    assert (weights[np.arange(500), drawn] > 0).all()
    if u == 0:
        assert drawn.tolist() == [np.flatnonzero(row)[0] for row in weights]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 2},
    ],
)
def test_nonsense_values_are_named(values):
    """A value outside its range is an error that names the field."""
    with pytest.raises(UserError, match=next(iter(values))):
        Sampled(**values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Greedy()),
        ({"do_sample": False, "temperature": 0.7}, Greedy()),
        ({"do_sample": True}, Sampled()),
        ({"do_sample": True, "temperature": 0.8, "top_p": 0.95}, Sampled(0.8, top_p=0.95)),
        ({"temperature": 0.6, "top_k": 20, "min_p": 0.1}, Sampled(0.6, top_k=20, min_p=0.1)),
        ({"temperature": 0}, Greedy()),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": None}, Sampled()),
        ({"do_sample": True, "top_k": -1}, Sampled()),
    ],
)
def test_generation_config_says_how_to_sample(values, expected):
    """As serving engines read it: greedy unless it samples or names a number; what filters nothing is off."""
    assert strategy_of(values, "generation_config.json") == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "hot"}, "folder/generation_config.json: temperature='hot' must be a number"),
        ({"top_p": 1.5}, r"folder/generation_config.json: top_p=1.5 must be in \(0, 1\]"),
        ({"do_sample": True, "top_k": 2.5}, "folder/generation_config.json: top_k=2.5 must be a whole number"),
    ],
)
def test_a_bad_generation_config_is_named(values, message):
    """The file, the key and the rule."""
    with pytest.raises(UserError, match=message):
        strategy_of(values, "folder/generation_config.json")
