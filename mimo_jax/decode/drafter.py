"""What the loop knows of a drafter: a small hashable object whose parameters and cache are pytrees.

`NoDrafter` makes plain decoding the same loop as speculation, with blocks of one token. The others:
`mimo_jax.drafters`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.decode.sampling import Search, Strategy, draw_with_distribution, least_kept
from mimo_jax.decode.verify import draft_keys
from mimo_jax.modeling.backbone import Features
from mimo_jax.weights import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the target and of its drafter."""

    target: Params
    drafter: Params = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftContext:
    """What a drafter drafts from: the anchor, the newest committed token, at position `lengths_B` of each row."""

    weights: Weights
    cache: Any  # the drafter's own
    anchor_B: Int[Array, "B"]
    lengths_B: Int[Array, "B"]
    strategy: Strategy
    keys_B: Array
    search: Search = dataclasses.field(default=least_kept, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadTokens:
    """What the target has just read: the first `counts_B` of `tokens_BT`, after `lengths_B` others.

    Ids beyond the vocabulary stand for media (`modeling.backbone.MEDIA`). In `text_BT` none is: it may be proposed.
    """

    tokens_BT: Int[Array, "B T"]
    text_BT: Int[Array, "B T"]
    features: Features
    lengths_B: Int[Array, "B"]
    counts_B: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """M tokens per row, the distributions they were drawn from (None: they were not drawn), and how many of them are
    proposed (None: all). Whether one is proposed may depend on those before it and on its distribution, never on the
    token itself or on later ones: else what is verified has not the distribution that it is said to be drawn from.
    """

    tokens: Int[Array, "B M"]
    probabilities: Float[Array, "B M C"] | None
    counts: Int[Array, "B"] | None = None


@runtime_checkable
class Drafter(Protocol):
    """The drafter's side of the loop."""

    @property
    def block_size(self) -> int:
        """Tokens the target verifies per round: the anchor and the drafts."""
        ...

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Target layers whose hidden states it reads (published: `target_layer_ids`)."""
        ...

    @property
    def expected(self) -> float | None:
        """Tokens per round that were measured with the target it was made for, if that is known."""
        ...

    def init_cache(self, batch: int, capacity: int) -> Any:
        """What it remembers of the context, before there is any."""
        ...

    def update_cache(self, weights: Weights, cache: Any, read: ReadTokens) -> Any:
        """The cache after what the target has read."""
        ...

    def propose(self, context: DraftContext) -> Draft:
        """Drafts after the anchor."""
        ...


@dataclasses.dataclass(frozen=True)
class NoDrafter:
    """Plain autoregressive decoding."""

    block_size: int = 1
    aux_layers: tuple[int, ...] = ()
    expected: float | None = None

    def init_cache(self, batch: int, capacity: int) -> tuple:
        return ()

    def update_cache(self, weights: Weights, cache: Any, read: ReadTokens) -> tuple:
        return ()

    def propose(self, context: DraftContext) -> Draft:
        return Draft(jnp.zeros((context.anchor_B.shape[0], 0), jnp.int32), None)


PLAIN = NoDrafter()


def draft_sequentially(
    logits_of: Callable[[int, Array, Any], tuple[Array, Any]],
    carry: Any,
    context: DraftContext,
    block_size: int,
    confidence: float = 0.0,
) -> Draft:
    """Draws draft after draft from `logits_of(position, token before it, carry)`, which also returns the next carry.

    With a `confidence`, as many are proposed as `confident` says.
    """
    drafted, distributions, likely, token_B = [], [], [], context.anchor_B
    for position in range(block_size - 1):
        logits_BC, carry = logits_of(position, token_B, carry)
        keys_B = draft_keys(context.keys_B, position)
        token_B, distribution_BC = draw_with_distribution(context.strategy, logits_BC, keys_B, context.search)
        drafted.append(token_B)
        if distribution_BC is not None:
            distributions.append(distribution_BC)
        if confidence:
            held_BC = jax.nn.softmax(logits_BC, axis=-1) if distribution_BC is None else distribution_BC
            likely.append(jnp.max(held_BC, axis=-1))
    return Draft(
        jnp.stack(drafted, axis=1),
        jnp.stack(distributions, axis=1) if distributions else None,
        confident(jnp.stack(likely, axis=1), confidence) if confidence else None,
    )


def confident(likely_BM: Float[Array, "B M"], confidence: float) -> Int[Array, "B"]:
    """How many drafts are proposed, if a block ends where the product of the likelihoods so far falls below
    `confidence`. They are those of the likeliest token in each place, as the drafter has it: so nothing hangs on the
    token drawn (see `Draft`).
    """
    return jnp.sum(jnp.cumprod(likely_BM, axis=1) >= confidence, axis=1)


def mask_unknown(logits_BC: Float[Array, "B C"], known: int) -> Float[Array, "B C"]:
    """Logits of a drafter that proposes only ids below `known`: a slice would move the rows of a sharded vocabulary."""
    if known == logits_BC.shape[-1]:
        return logits_BC
    return jnp.where(jnp.arange(logits_BC.shape[-1]) < known, logits_BC, -jnp.inf)
