"""Bytes: what every device of a mesh holds, and what it must read for one round of decoding.

Formulas: distinct experts of T tokens under even routing, D(T) = E (1 - (1 - k/E)^T); every other weight is read once
per round, the embedding by rows, the MTP layers not at all. The sizes come from the checkpoint's own name table.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jax.sharding import AbstractMesh, AxisType

from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.config.model import GLOBAL, MAX_BLOCK, SLIDING, FileFormat, ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.sharding import MeshShape, weight_bytes
from mimo_jax.weights.params import Weight, drafter_weights, weights

_TRIALS = 200


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is planned: the model, its drafter, how both are spread, and the bytes of one cached number."""

    config: ModelConfig
    file_format: FileFormat
    drafter: DrafterConfig  # stored as BF16
    shape: MeshShape
    cache_itemsize: int
    backend: str | None = None  # that multiplies the experts; None: the target's fastest

    def weights(self) -> Iterator[Weight]:
        """The target's."""
        return weights(self.config, self.file_format)

    def drafter_weights(self) -> Iterator[Weight]:
        return drafter_weights(self.drafter, "bfloat16")

    @property
    def mesh(self) -> AbstractMesh:
        sizes = dataclasses.asdict(self.shape)
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_shape_for(config: ModelConfig, devices: int, groups: int) -> MeshShape:
    """The shape of a mesh of `devices` that spreads one copy of the model over as many of them as its heads allow."""
    for replica in range(devices, groups - 1, -1):
        if devices % replica or replica % groups:
            continue
        shape = MeshShape(devices // replica, groups, replica // groups)
        try:
            shape.check_divides(config)
        except UserError as error:
            if replica == groups:
                raise error
            continue
        return shape
    raise UserError(f"mesh: {devices} devices cannot be shared by {groups} groups of experts")


def distinct_experts(config: ModelConfig, tokens: int) -> float:
    """Experts of one layer that `tokens` tokens touch together, routed evenly and independently."""
    return config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** tokens)


def busiest_share(plan: Plan, tokens: int) -> float:
    """Active experts on the busiest device over those of the mean one; 1 without expert parallelism."""
    groups, config = plan.shape.expert, plan.config
    if groups == 1:
        return 1.0
    rng = np.random.default_rng(0)
    scores = rng.random((_TRIALS, tokens, config.num_experts))
    chosen = np.argsort(scores, axis=-1)[..., : config.experts_per_token]
    active = np.zeros((_TRIALS, config.num_experts), bool)
    for trial, ids in enumerate(chosen):
        active[trial, ids] = True
    per_group = active.reshape(_TRIALS, groups, -1).sum(-1)
    return float(np.mean(per_group.max(-1) / per_group.mean(-1)))


def resident_weights(plan: Plan) -> dict[str, float]:
    """Bytes of weights on each device, by part of the model."""
    held: collections.Counter[str] = collections.Counter()
    for weight in plan.weights():
        held[_part_of(weight.path)] += weight_bytes(iter([weight]), plan.mesh)
    return {**held, "drafter": weight_bytes(plan.drafter_weights(), plan.mesh)}


def _part_of(path: tuple[str, ...]) -> str:
    if path[0].startswith("mtp"):
        return "MTP layers"
    if "moe" in path:
        return "router" if path[-1].startswith("router") else "experts"
    named = {"embed": "embedding", "head": "head", "qkv": "QKV", "q": "QKV", "k": "QKV", "v": "QKV", "o": "o_proj"}
    return named.get(path[-1], "dense MLP" if "mlp" in path else "norms and sinks")


def cache_bytes(plan: Plan, context: int) -> float:
    """Bytes of keys and values on each device, for one row of `context` tokens, the drafter's included."""
    config, drafter = plan.config, plan.drafter
    numbers = config.cached_numbers(context, min(context, config.sliding_window - 1 + MAX_BLOCK))
    ring = min(context, drafter.window + drafter.block_size)
    numbers += drafter.num_layers * ring * drafter.num_kv_heads * 2 * drafter.head_dim
    return numbers * plan.cache_itemsize / plan.shape.replica


def round_reads(plan: Plan, tokens: int, context: int, draft: bool) -> dict[str, float]:
    """Bytes the busiest device reads to verify `tokens` tokens after `context`, and to draft them if `draft`."""
    config, held = plan.config, resident_weights(plan)
    per_expert = held["experts"] / config.num_experts
    reads = {name: size for name, size in held.items() if name not in ("MTP layers", "embedding", "drafter")}
    reads["experts"] = per_expert * distinct_experts(config, tokens) * busiest_share(plan, tokens)
    reads["embedding"] = held["embedding"] / config.vocab_size * tokens
    reads["cache"] = cache_bytes(plan, context)
    if draft:
        reads["drafter"] = held["drafter"] + held["head"]
    return reads


def round_flops(plan: Plan, tokens: int, context: int) -> float:
    """Operations of each device to verify `tokens` tokens after `context`: two per weight and token, and attention."""
    config = plan.config
    numbers = 0.0
    for weight in plan.weights():
        if weight.path[0].startswith("mtp") or weight.path[-1] == "embed":
            continue
        share = config.experts_per_token / config.num_experts if _part_of(weight.path) == "experts" else 1.0
        numbers += math.prod(weight.shape) * share
    seen = {GLOBAL: context, SLIDING: min(context, config.sliding_window)}
    attention = sum(
        seen[kind] * config.num_heads * (config.head_dim + config.v_head_dim) for kind in config.layer_pattern
    )
    return 2 * tokens * (numbers + attention) / plan.shape.replica
