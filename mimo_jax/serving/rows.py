"""Rows of a running state: put in, taken out, and cut into pieces along their tokens.

How the caches of a step and of a drafter lie in memory is theirs to know. Here it is derived: the axis that grows with
the batch is that of rows, the one that grows with the capacity that of tokens. What has none of the latter is a ring,
or a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.decode.loop import Decoder, State
from mimo_jax.errors import UserError

NONE = -1

Caches = tuple[Any, Any]  # of a step and of its drafter
Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Axes:
    """Of each array of the caches: its axis of rows, its axis of tokens or NONE, and how many tokens a row may have."""

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    capacity: int

    def places(self, tokens: Any, length: int) -> Any:
        """What so many tokens are on an axis that is `length` long: a place of it may hold several of them."""
        return tokens * (length // self.capacity) if length >= self.capacity else tokens // (self.capacity // length)


def axes_of(decoder: Decoder, capacity: int) -> Axes | None:
    """None for a step that keeps its rows apart: then a batch has one."""

    def shapes(batch: int, capacity: int) -> Any:
        make = (decoder.step.init_cache, decoder.drafter.init_cache)
        return jax.tree.flatten(jax.eval_shape(lambda: [one(batch, capacity) for one in make]))

    (one, structure), (two, of_two), (longer, _) = shapes(1, capacity), shapes(2, capacity), shapes(1, 2 * capacity)
    if structure != of_two:
        return None
    return Axes(tuple(map(_growing, one, two)), tuple(map(_growing, one, longer)), capacity)


def _growing(one: Any, other: Any) -> int:
    return next((axis for axis, (a, b) in enumerate(zip(one.shape, other.shape)) if a != b), NONE)


def check_slots(axes: Axes | None, slots: int) -> None:
    if axes is None and slots > 1:
        raise UserError(f"slots={slots}: this step decodes one text at a time; slots=1")


@partial(jax.jit, static_argnames="axes", donate_argnames="state")
def _insert(axes: Axes, state: State, row: State, slot: jax.Array) -> State:
    def put(whole: jax.Array, one: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, one, slot, axis)

    caches = _with_axes(put, axes.rows, _caches(state), _caches(row))
    rest = jax.tree.map(put, _without_caches(state), _without_caches(row))
    return dataclasses.replace(rest, cache=caches[0], draft_cache=caches[1])


def insert(axes: Axes | None, state: State, row: State, slot: int) -> State:
    """The state whose row `slot` is the only one of `row`. `state` is donated."""
    return row if axes is None else _insert(axes, state, row, jnp.int32(slot))


@partial(jax.jit, static_argnames="axes")
def take(axes: Axes, state: State, slot: jax.Array) -> Caches:
    """The caches of one row, as a copy."""

    def one(whole: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(whole, slot, 1, axis)

    return _with_axes(one, axes.rows, _caches(state))


@partial(jax.jit, static_argnames=("axes", "size"))
def piece(axes: Axes, caches: Caches, start: jax.Array, size: int) -> Arrays:
    """What tokens `start` to `start` + `size` left in what grows, as a copy. Both are whole places of every axis."""
    return tuple(
        jax.lax.dynamic_slice_in_dim(
            leaf, axes.places(start, leaf.shape[axis]), axes.places(size, leaf.shape[axis]), axis
        )
        for leaf, axis in zip(jax.tree.leaves(caches), axes.tokens)
        if axis != NONE
    )


@partial(jax.jit, static_argnames="axes")
def fixed(axes: Axes, caches: Caches) -> Arrays:
    """What does not grow, as a copy: rings, lengths."""
    return tuple(jnp.copy(leaf) for leaf, axis in zip(jax.tree.leaves(caches), axes.tokens) if axis == NONE)


@partial(jax.jit, static_argnames="axes", donate_argnames="caches")
def put_piece(axes: Axes, caches: Caches, held: Arrays, start: jax.Array) -> Caches:
    """The opposite of `piece`."""
    pieces = iter(held)

    def put(leaf: jax.Array, axis: int) -> jax.Array:
        if axis == NONE:
            return leaf
        return jax.lax.dynamic_update_slice_in_dim(leaf, next(pieces), axes.places(start, leaf.shape[axis]), axis)

    return _with_axes(put, axes.tokens, caches)


@partial(jax.jit, static_argnames="axes", donate_argnames="caches")
def put_fixed(axes: Axes, caches: Caches, held: Arrays) -> Caches:
    """The opposite of `fixed`."""
    kept = iter(held)
    return _with_axes(lambda leaf, axis: leaf if axis != NONE else jnp.copy(next(kept)), axes.tokens, caches)


def _with_axes(function: Callable[..., jax.Array], axes: Sequence[int], *trees: Any) -> Any:
    """`function(leaf, .., axis)` of every leaf."""
    structure = jax.tree.structure(trees[0])
    leaves = zip(*map(jax.tree.leaves, trees))
    return jax.tree.unflatten(structure, [function(*each, axis) for each, axis in zip(leaves, axes)])


def _caches(state: State) -> Caches:
    return state.cache, state.draft_cache


def _without_caches(state: State) -> State:
    return dataclasses.replace(state, cache=None, draft_cache=None)
