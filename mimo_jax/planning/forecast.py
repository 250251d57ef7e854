"""Projected speed: the roofline of a round, and a range around it with its assumptions named. Nothing is measured."""

from __future__ import annotations

import dataclasses

from mimo_jax.planning.machines import Target
from mimo_jax.planning.traffic import Plan, round_flops, round_reads

ACCEPTANCES = (1.0, 4.29, 5.56, 6.30)  # plain decoding; published for UltraSpeed by domain


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a projection takes for granted: the share of peak bandwidth reached, and seconds per all-reduce."""

    efficiency: float
    all_reduce: float


BOUNDS = {"low": Assumptions(0.6, 8e-6), "high": Assumptions(0.9, 2.5e-6)}


def all_reduces(plan: Plan, draft: bool) -> int:
    """Sums over the devices in a round: two per layer, one for the embedding, two for the head; none on one device."""
    if plan.shape.replica == 1:
        return 0
    layers = len(plan.config.layer_pattern) + (plan.drafter.num_layers if draft else 0)
    return 2 * layers + 3


def roofline_seconds(plan: Plan, target: Target, tokens: int, context: int, draft: bool) -> float:
    """The time of a round at full bandwidth, or at full arithmetic speed if that takes longer."""
    read = sum(round_reads(plan, tokens, context, draft).values()) / target.gpu.bandwidth
    return max(read, round_flops(plan, tokens, context) / target.gpu.flops)


def tokens_per_second(plan: Plan, target: Target, context: int, accepted: float, assumed: Assumptions) -> float:
    """Projected speed at `accepted` tokens per round; at 1, plain decoding without a drafter."""
    draft = accepted > 1
    tokens = plan.drafter.block_size if draft else 1
    seconds = roofline_seconds(plan, target, tokens, context, draft) / assumed.efficiency
    return accepted / (seconds + all_reduces(plan, draft) * assumed.all_reduce)
