"""Lossless verification: how much of a drafted block is kept, and which token follows what is kept.

Whatever was drafted, the emitted tokens have exactly the target's distribution. Below, x_i is draft i, q_i the
distribution it was drawn from, p_i the target's distribution at its place, and p_{M+1} the target's distribution after
the last of M drafts.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mimo_jax.decode.sampling import Greedy, Search, Strategy, draw, least_kept, most_likely, probabilities, sample
from mimo_jax.errors import UserError

RULES = ("token", "block")
TINY = jnp.finfo(jnp.float32).tiny  # 1 / TINY is finite
EPS = jnp.finfo(jnp.float32).eps

# The random streams of a round. Tokens are drafted, accepted and completed independently of each other.
DRAFT, ACCEPT, FOLLOW = range(3)


def _stream(keys_B: Array, index: int) -> Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)


def draft_keys(keys_B: Array, position: int) -> Array:
    """The keys with which a drafter draws the draft at `position` of those that `verify` is given with `keys_B`."""
    return _stream(_stream(keys_B, DRAFT), position)


def verify(
    strategy: Strategy,
    rule: str,
    logits_BNC: Float[Array, "B N C"],
    drafts_BM: Int[Array, "B M"],
    q_BMC: Float[Array, "B M C"] | None,
    keys_B: Array,
    best_BN: Int[Array, "B N"] | None = None,
    counts_B: Int[Array, "B"] | None = None,
    search: Search = least_kept,
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """How many drafts each row accepts, and the token that follows them.

    `logits_BNC` are the target's, after the anchor and after each draft: N = M + 1; `best_BN` are the first of the
    largest of them, where those are known. `q_BMC` holds the distributions that the drafts were drawn from; None says
    that they were not drawn. Of row b only the first `counts_B[b]` were proposed. `rule`, one of `RULES`, and `search`,
    which finds thresholds of filters, matter where tokens are sampled. Row b uses only `keys_B[b]`; without drafts its
    token is that of `draw` with the same keys.
    """
    if rule not in RULES:
        raise UserError(f"verification: unknown rule {rule!r}; the rules are {', '.join(RULES)}")
    if isinstance(strategy, Greedy):
        return _verify_greedy(most_likely(logits_BNC) if best_BN is None else best_BN, drafts_BM, counts_B)
    batch, count = drafts_BM.shape
    if count == 0:
        return jnp.zeros(batch, jnp.int32), draw(strategy, logits_BNC[:, 0], keys_B, search)
    if q_BMC is None:
        q_BMC = jax.nn.one_hot(drafts_BM, logits_BNC.shape[-1])
    p_BNC = probabilities(strategy, logits_BNC, search)
    thresholds_BM, following_BNC = acceptance(rule, p_BNC, q_BMC, drafts_BM, counts_B)
    u_BM = jax.vmap(partial(jax.random.uniform, shape=(count,)))(_stream(keys_B, ACCEPT))
    accepted_B = _count(rule, u_BM < thresholds_BM)  # strict: u may be 0, and a threshold of 0 never passes
    return accepted_B, sample(_pick(following_BNC, accepted_B), _stream(keys_B, FOLLOW))


def _verify_greedy(
    best_BN: Int[Array, "B N"], drafts_BM: Int[Array, "B M"], counts_B: Int[Array, "B"] | None
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Drafts are accepted as long as they are the target's most likely tokens."""
    accepted_B = _count("token", _proposed(drafts_BM, counts_B) & (drafts_BM == best_BN[:, :-1]))
    return accepted_B, _pick(best_BN, accepted_B)


def acceptance(
    rule: str,
    p_BNC: Float[Array, "B N C"],
    q_BMC: Float[Array, "B M C"],
    drafts_BM: Int[Array, "B M"],
    counts_B: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B M"], Float[Array, "B N C"]]:
    """The threshold each draft passes when its uniform number is below, and the distribution of the token after i
    drafts.

    "token" accepts the drafts before the first that fails: speculative sampling, arXiv 2211.17192, algorithm 1.
    "block" accepts the drafts up to the last that passes: block verification, arXiv 2403.10444, algorithm 2.
    """
    is_proposed_BM = _proposed(drafts_BM, counts_B)
    drafts_BM1 = drafts_BM[..., None]
    p_BM1 = jnp.take_along_axis(p_BNC[:, :-1], drafts_BM1, axis=-1)
    q_BM1 = jnp.take_along_axis(q_BMC, drafts_BM1, axis=-1)
    ratio_BM = (p_BM1 / jnp.maximum(q_BM1, TINY))[..., 0]
    reach_BN = _reach(ratio_BM) if rule == "block" else jnp.ones(p_BNC.shape[:2])
    # After the last draft nothing was proposed, so q = 0 there: the residual is the target's distribution.
    proposed_BMC = jnp.where(is_proposed_BM[..., None], q_BMC, 0.0)
    residual_BNC = jnp.maximum(reach_BN[..., None] * p_BNC - jnp.pad(proposed_BMC, ((0, 0), (0, 1), (0, 0))), 0.0)
    mass_BN = jnp.sum(residual_BNC, axis=-1)
    # A block ends at a place with probability `mass`, so what little is left below EPS is rounding and not a
    # distribution.
    weights_BNC = jnp.where(mass_BN[..., None] > EPS, residual_BNC, p_BNC)
    following_BNC = weights_BNC / jnp.sum(weights_BNC, axis=-1, keepdims=True)
    if rule == "token":
        return jnp.where(is_proposed_BM, jnp.minimum(ratio_BM, 1.0), 0.0), following_BNC
    # h_i = R_i / (R_i + 1 - r_i); at the last place that is r_M. In another order a small R_i would be lost in the 1.
    mass_BM, reach_BM = mass_BN[:, 1:], reach_BN[:, 1:]
    passing_BM = mass_BM / jnp.maximum(mass_BM + (1 - reach_BM), TINY)
    return jnp.where(is_proposed_BM, passing_BM, 0.0), following_BNC


def _proposed(drafts_BM: Int[Array, "B M"], counts_B: Int[Array, "B"] | None) -> Bool[Array, "B M"]:
    if counts_B is None:
        return jnp.ones(drafts_BM.shape, bool)
    return jnp.arange(drafts_BM.shape[1]) < counts_B[:, None]


def _reach(ratio_BM: Float[Array, "B M"]) -> Float[Array, "B N"]:
    """r_0 = 1, r_i = min(r_{i-1} p_i(x_i) / q_i(x_i), 1)."""
    one_B = jnp.ones(ratio_BM.shape[0])
    return jnp.stack(list(accumulate(ratio_BM.T, lambda r, ratio: jnp.minimum(r * ratio, 1.0), initial=one_B)), axis=1)


def _count(rule: str, passed_BM: Bool[Array, "B M"]) -> Int[Array, "B"]:
    """Accepted drafts: the leading ones that passed, or all up to the last one that passed."""
    if rule == "token":
        return jnp.sum(jnp.cumprod(passed_BM, axis=1), axis=1)
    return jnp.max(jnp.where(passed_BM, jnp.arange(1, passed_BM.shape[1] + 1), 0), axis=1)


def _pick(values_BN: Array, index_B: Int[Array, "B"]) -> Array:
    """Row b's entry `index_B[b]`."""
    return jax.vmap(lambda values_N, index: values_N[index])(values_BN, index_B)
