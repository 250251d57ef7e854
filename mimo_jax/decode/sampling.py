"""Sampling strategies: tiny frozen objects. What is switched on decides the program, the numbers do not recompile it.

Filters apply in the order temperature, top-k, top-p, min-p. Each keeps every token at least as likely as its
threshold token, so that equal probabilities are never told apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """Always the most likely token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """Samples at `temperature` from what the filters keep; a filter that is None is off.

    Where rows draw by strategies of their own, every number is an array[B], see `rows_of`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        for name, (holds, expected) in _RULES.items():
            value = getattr(self, name)
            if isinstance(value, bool | str):
                raise UserError(f"sampling: {name}={value!r} must be {expected}")
            number = value.item() if isinstance(value, np.generic) else value
            if not isinstance(number, int | float):  # None; or a tracer inside jit, which was checked before
                continue
            if not holds(number):
                raise UserError(f"sampling: {name}={number} must be {expected}")
            # In int32 more than all tokens are all tokens.
            object.__setattr__(self, name, min(number, INT32_MAX) if name == "top_k" else number)


_RULES = {
    "temperature": (lambda t: 0 < t < math.inf, "a finite number above 0"),
    "top_k": (lambda k: isinstance(k, int) and k >= 1, "a whole number from 1"),
    "top_p": (lambda p: 0 < p <= 1, "in (0, 1]"),
    "min_p": (lambda p: 0 <= p <= 1, "in [0, 1]"),
}
INT32_MAX = 2**31 - 1
GROUPS = 64  # of tokens, in `sample`: each device that holds a share of the vocabulary holds whole ones
# Below it, temperatures make every logit but the largest impossible all the same; a smaller one would overflow.
LEAST_TEMPERATURE = 1e-30

Strategy = Greedy | Sampled
Search = Callable[[Array, Array, Any], Array]  # `least_kept`, or what does the same


def strategy_of(values: dict[str, Any], where: str) -> Strategy:
    """What a `generation_config.json` says: greedy unless it samples, by `do_sample` or by naming a number.

    A temperature of 0 is greedy; filters that filter nothing (top_k 0 or -1, top_p 1, min_p 0) are off.
    """
    given = {name: values[name] for name in _OFF if values.get(name) is not None}
    if values.get("do_sample") is False or given.get("temperature") == 0 or not (values.get("do_sample") or given):
        return Greedy()
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: {name}={value!r} must be a number")
    try:
        return Sampled(**{name: value for name, value in given.items() if value not in _OFF[name]})
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('sampling: ')}") from None


_OFF: dict[str, tuple[float, ...]] = {"temperature": (), "top_k": (0, -1), "top_p": (1,), "min_p": (0,)}


def rows_of(strategies: Sequence[Strategy]) -> Strategy:
    """One strategy for a batch whose row b draws by `strategies[b]`, with the same result as each has alone."""
    first, *others = strategies
    return first if all(other == first for other in others) else columns_of(strategies)


def columns_of(strategies: Sequence[Strategy]) -> Strategy:
    """The same for rows that come and go: one of three programs, whatever the rows.

    All are greedy; or no row uses more than temperature and top-p; or every filter is there. A filter that a row does
    not use is given a number that filters nothing, and greedy rows among others have temperature 0.
    """
    sampled = [row for row in strategies if isinstance(row, Sampled)]
    if not sampled:
        return Greedy()
    is_usual = all(row.top_k is None and row.min_p is None for row in sampled)
    names = ("temperature", "top_p") if is_usual else _UNUSED

    def column(name: str) -> Any:
        off = 0.0 if name == "temperature" else _UNUSED[name]
        values = [getattr(row, name, off) for row in strategies]
        dtype = np.int32 if name == "top_k" else np.float32
        return np.array([_UNUSED[name] if value is None else value for value in values], dtype)

    return Sampled(**{name: column(name) for name in names})


_UNUSED = {"temperature": 1.0, "top_k": INT32_MAX, "top_p": 1.0, "min_p": 0.0}


def least_kept(p: Float[Array, "*B C"], weights: Float[Array, "*B C"], wanted: Array | int) -> Float[Array, "*B 1"]:
    """The largest entry t of `p` for which the `weights` of all entries from t on sum up to `wanted`; 0 if none does.

    The bits of floats from 0 to 1 are in their order, so t is found some bits at a time: on a GPU it is passes over the
    entries that cost, on a CPU comparisons. To sort instead would bring a vocabulary together that devices share.
    """
    step = 1 if jax.default_backend() == "cpu" else 5
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)
    found = jnp.zeros_like(bits[..., :1])
    for shift in range(30 - step, -1, -step):
        tried = found + (jnp.arange(1, 2**step) << shift)
        is_kept = bits[..., None, :] >= tried[..., None]
        sums = jnp.sum(jnp.where(is_kept, weights[..., None, :], 0.0), axis=-1)
        found += jnp.sum(sums >= wanted, axis=-1, keepdims=True) << shift
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def probabilities(
    strategy: Strategy, logits: Float[Array, "*B C"], search: Search = least_kept
) -> Float[Array, "*B C"]:
    """The distribution `strategy` draws the next token from, in float32. `search` finds thresholds of filters."""
    if isinstance(strategy, Greedy):
        return jax.nn.one_hot(most_likely(logits), logits.shape[-1])
    temperature, top_k, top_p, min_p = (_per_row(getattr(strategy, name), logits.ndim) for name in _UNUSED)
    p = jax.nn.softmax(logits.astype(jnp.float32) / jnp.maximum(temperature, LEAST_TEMPERATURE), axis=-1)
    # Every threshold is one of the values of `p` itself, so that no rounding tells equal probabilities apart.
    threshold = jnp.zeros_like(p[..., :1])
    if top_k is not None:
        threshold = search(p, jnp.ones_like(p), top_k)
    if top_p is not None:
        candidates = jnp.where(p >= threshold, p, 0.0)
        total = jnp.sum(candidates, axis=-1, keepdims=True)
        # All of them may seem to be reached without the least ones, which add nothing to a sum in float32.
        nucleus = jnp.where(top_p < 1, search(p, candidates, top_p * total), 0.0)
        threshold = jnp.maximum(threshold, nucleus)
    if min_p is not None:
        threshold = jnp.maximum(threshold, min_p * jnp.max(p, axis=-1, keepdims=True))
    kept = jnp.where(p >= threshold, p, 0.0)
    drawn = kept / jnp.sum(kept, axis=-1, keepdims=True)
    if not jnp.ndim(strategy.temperature):
        return drawn
    return jnp.where(temperature > 0, drawn, jax.nn.one_hot(most_likely(logits), logits.shape[-1]))


def _per_row(value: Any, rank: int) -> Any:
    """A number as it is; an array[B] beside logits of so many axes, whose first is B."""
    return value if value is None or not jnp.ndim(value) else jnp.reshape(value, (-1,) + (1,) * (rank - 1))


def most_likely(logits: Float[Array, "*B C"]) -> Int[Array, "*B"]:
    """The first of the largest entries. On CPU XLA's `argmax` goes entry by entry, ten times as slow (docs/LOG.md)."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits == top, ids, logits.shape[-1] - 1), axis=-1)


def draw(
    strategy: Strategy, logits_BC: Float[Array, "B C"], keys_B: Array, search: Search = least_kept
) -> Int[Array, "B"]:
    """One token per row; row b uses only `keys_B[b]`, so a row never depends on its batch mates."""
    return draw_with_distribution(strategy, logits_BC, keys_B, search)[0]


def draw_with_distribution(
    strategy: Strategy, logits_BC: Float[Array, "B C"], keys_B: Array, search: Search = least_kept
) -> tuple[Int[Array, "B"], Float[Array, "B C"] | None]:
    """`draw`'s tokens and the distributions they were drawn from; the most likely token is not drawn (None)."""
    if isinstance(strategy, Greedy):
        return most_likely(logits_BC), None
    p_BC = probabilities(strategy, logits_BC, search)
    return sample(p_BC, keys_B), p_BC


def sample(weights_BC: Float[Array, "B C"], keys_B: Array) -> Int[Array, "B"]:
    """One token per row, each as likely as its share of the row's weights; one of weight 0 is never drawn.

    By inversion: a group of tokens, then one of the group. Two random numbers per row do; a random number per token
    costs more than the native step's whole round on CPU.
    """
    batch, count = weights_BC.shape
    size = -(-count // GROUPS)
    grouped = jnp.pad(weights_BC, ((0, 0), (0, GROUPS * size - count))).reshape(batch, GROUPS, size)
    u_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    group_B = _invert(jnp.sum(grouped, axis=-1), u_B2[:, 0])
    of_group = jnp.take_along_axis(grouped, group_B[:, None, None], axis=1)[:, 0]
    return group_B * size + _invert(of_group, u_B2[:, 1])


def _invert(weights_BC: Float[Array, "B C"], u_B: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first entry at which the sum of the weights so far passes the share `u` < 1 of all.

    Entries without weight are skipped by their weight, not by their sum: sums of a parallel scan need not rise.
    """
    sums_BC = jnp.where(weights_BC > 0, jnp.cumsum(weights_BC, axis=-1), 0.0)
    share_B = u_B * jnp.max(sums_BC, axis=-1)
    last = weights_BC.shape[1] - 1
    return jnp.min(jnp.where(sums_BC > share_B[:, None], jnp.arange(last + 1), last), axis=-1)


def strategy_at(temperature: float) -> Strategy:
    """Unfiltered sampling at a temperature; at 0, the most likely token."""
    return Sampled(temperature) if temperature else Greedy()
