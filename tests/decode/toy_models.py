"""Toy models over three tokens: `model[k][history]` is the distribution of the token after k tokens of history."""

from __future__ import annotations

import numpy as np

VOCAB = 3
Model = list[np.ndarray]


def normalised(weights: np.ndarray) -> np.ndarray:
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def random_model(rng: np.random.Generator, places: int, allowed=range(VOCAB)) -> Model:
    """Distributions that depend on the whole history, between nearly even and nearly certain."""
    mask = np.isin(np.arange(VOCAB), allowed)
    return [normalised(mask * rng.gamma(0.5, size=(VOCAB,) * (k + 1)) + mask * 1e-3) for k in range(places)]


def one_hot_model(rng: np.random.Generator, places: int) -> Model:
    return [np.eye(VOCAB, dtype=np.float32)[rng.integers(0, VOCAB, (VOCAB,) * k)] for k in range(places)]


def sparse_model(rng: np.random.Generator, places: int) -> Model:
    """One token in three is impossible, another one after every history."""
    holes = one_hot_model(rng, places)
    return [normalised(table * (1 - hole)) for table, hole in zip(random_model(rng, places), holes)]


def nearly(model: Model, rng: np.random.Generator, distance: float) -> Model:
    return [normalised(table * np.exp(distance * rng.normal(size=table.shape))) for table in model]


def without_history(model: Model) -> Model:
    return [np.broadcast_to(table[(0,) * k], table.shape) for k, table in enumerate(model)]


def pair(kind: str, drafts: int, seed: int = 0) -> tuple[Model, Model]:
    """A target for `drafts` drafts and the token after them, and a drafter."""
    rng = np.random.default_rng([seed, drafts])
    p = random_model(rng, drafts + 1)
    q = random_model(rng, drafts)
    if kind == "without history":
        return without_history(p), without_history(q)
    if kind == "equal":
        return p, p[:-1]
    if kind == "nearly equal":
        return p, nearly(p[:-1], rng, 1e-3)
    if kind == "equal but for rounding":
        return p, nearly(p[:-1], rng, 3e-7)
    if kind == "equal at first":
        return p, p[:1] + q[1:]
    if kind == "disjoint":
        return random_model(rng, drafts + 1, [0, 1]), random_model(rng, drafts, [2])
    if kind == "certain target":
        return one_hot_model(rng, drafts + 1), q
    if kind == "certain drafts":
        return p, one_hot_model(rng, drafts)
    if kind == "both certain":
        return one_hot_model(rng, drafts + 1), one_hot_model(rng, drafts)
    if kind == "masked target":  # a grammar's, whose drafts know nothing of it
        return sparse_model(rng, drafts + 1), q
    if kind == "zeros in both":
        return sparse_model(rng, drafts + 1), sparse_model(rng, drafts)
    assert kind == "random"
    return p, q


KINDS = (
    *("random", "without history", "equal", "nearly equal", "equal but for rounding", "equal at first"),
    *("disjoint", "certain target", "certain drafts", "both certain", "masked target", "zeros in both"),
)
