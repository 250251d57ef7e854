"""Pretraining, as pure functions over one state.

Experts are kept balanced without an auxiliary loss: a bias that only selects moves by a fixed step towards the
under-used ones (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mimo_jax.cli.memory import check_memory
from mimo_jax.config.model import ModelConfig
from mimo_jax.errors import UserError, check_real, check_whole
from mimo_jax.modeling.backbone import Backbone, abstract_params, init_params
from mimo_jax.training.optimizers import check_rate, learning_rate, make_optimizer
from mimo_jax.weights import Params
from pallas_kernels.mxfp4 import SCALE_RULES


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run. Steps are optimiser updates; `length` and `batch` are tokens per sequence and sequences per step."""

    batch: int = 16
    length: int = 512
    peak_rate: float = 4e-3
    warmup: int = 100
    decay_start: int = 0
    decay_steps: int = 0  # 0: the rate stays at its peak
    qat: bool = False  # learn beside it how the experts are rounded (qat.py)
    scale_rule: str = "even"  # that chooses their scales, see `pallas_kernels.mxfp4`
    weight_decay: float = 0.1
    mtp_weight: float = 0.3
    mtp_share: int = 4  # MTP layers learn from one sequence in this many
    balance_rate: float = 5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("training", 1, batch=self.batch, mtp_share=self.mtp_share)
        check_whole("training", 2, length=self.length)  # MTP layers predict the token after the next
        check_whole("training", 0, warmup=self.warmup, decay_start=self.decay_start, decay_steps=self.decay_steps)
        check_whole("training", 0, 2**32 - 1, seed=self.seed)
        check_rate("training", self.peak_rate)
        check_real("training", 0, 1, weight_decay=self.weight_decay, balance_rate=self.balance_rate)
        check_real("training", 0, 1000, mtp_weight=self.mtp_weight)
        if not isinstance(self.qat, bool):
            raise UserError(f"training: qat={self.qat!r} must be true or false")
        if self.scale_rule not in SCALE_RULES:
            raise UserError(f"training: scale_rule={self.scale_rule!r} must be one of {', '.join(SCALE_RULES)}")

    @property
    def mtp_rows(self) -> int:
        """Sequences of a batch that the MTP layers learn from."""
        return max(1, self.batch // self.mtp_share)

    @property
    def schedule(self) -> optax.Schedule:
        return learning_rate(self.peak_rate, self.warmup, self.decay_start, self.decay_steps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Float32 master parameters, optimiser state, and the number of updates made."""

    params: Params
    optimizer: Any
    step: Int[Array, ""]

    @classmethod
    def begin(cls, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """Before the first update."""
        return cls(params, optimizer.init(params), jnp.int32(0))

    def after(self, gradients: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """One update more."""
        updates, optimizer_state = optimizer.update(gradients, self.optimizer, self.params)
        params: Any = optax.apply_updates(self.params, updates)
        return TrainState(params, optimizer_state, self.step + 1)


def init_state(config: ModelConfig, train: TrainConfig, params: Params | None = None) -> TrainState:
    """The state before the first update: random parameters unless float32 `params` are given."""
    if params is None:
        held = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
        check_memory(2 * 4 * held, "random weights and the optimiser's state")
        params = init_params(config, jax.random.key(train.seed))
    return TrainState.begin(params, make_optimizer(train.schedule, train.weight_decay))


def cross_entropy(logits_BTC: Float[Array, "B T C"], targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Nats per position, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTC.astype(jnp.float32), targets_BT)


def loss_fn(params: Params, window_BT: Int[Array, "B _"], config: ModelConfig, train: TrainConfig):
    """Next-token loss plus the weighted MTP loss; the second value holds both, the expert counts and the logits."""
    apply: Callable[..., Any] = Backbone(config).apply
    tokens_BT, targets_BT = window_BT[:, :-1], window_BT[:, 1:]
    logits_BTC, features, _ = apply({"params": params}, tokens_BT)
    loss = jnp.mean(cross_entropy(logits_BTC, targets_BT))
    rows = train.mtp_rows
    hidden_BTD, targets_BT = features.hidden[:rows], targets_BT[:rows]
    ahead = apply({"params": params}, hidden_BTD, tokens_BT[:rows], method="predict_ahead")
    mtp_loss = jnp.float32(0)
    for depth, ahead_BTC in enumerate(ahead, start=1):
        last = tokens_BT.shape[1] - depth
        mtp_loss += jnp.mean(cross_entropy(ahead_BTC[:, :last], targets_BT[:, depth:])) / len(ahead)
    return loss + train.mtp_weight * mtp_loss, (loss, mtp_loss, features.expert_counts, logits_BTC)


def balance_experts(
    params: Params, counts_LE: Int[Array, "L E"], config: ModelConfig, rate: Float[Array, ""] | float
) -> Params:
    """Raises the selection bias of experts below the mean load by `rate`, lowers it above."""
    layers = [f"layers_{layer}" for layer, has_experts in enumerate(config.moe_pattern) if has_experts]
    params = dict(params)
    for name, counts_E in zip(layers, counts_LE):
        moe = params[name]["moe"]
        bias_E = moe["router_bias"] + rate * jnp.sign(jnp.mean(counts_E) - counts_E)
        params[name] = {**params[name], "moe": {**moe, "router_bias": bias_E}}
    return params


def updated(
    state: TrainState, window_BT: Int[Array, "B _"], config: ModelConfig, train: TrainConfig
) -> tuple[TrainState, dict[str, Array], Float[Array, "B T C"]]:
    """The state after one update, scalar metrics, and the logits before it."""
    gradients, (loss, mtp_loss, counts_LE, logits_BTC) = jax.grad(loss_fn, has_aux=True)(
        state.params, window_BT, config, train
    )
    new = state.after(gradients, make_optimizer(train.schedule, train.weight_decay))
    # The bias comes to rest with the weights: jitter at the end would be noise in the exported router.
    descent = train.schedule(state.step) / train.peak_rate if train.decay_steps else 1.0
    params = balance_experts(new.params, counts_LE, config, train.balance_rate * descent)
    metrics = {
        "loss": loss,
        "mtp_loss": mtp_loss,
        "gradient_norm": optax.tree.norm(gradients),
        "rate": train.schedule(state.step),
        "imbalance": jnp.mean(jnp.max(counts_LE, axis=1) / jnp.mean(counts_LE, axis=1)),
    }
    return dataclasses.replace(new, params=params), metrics, logits_BTC


@partial(jax.jit, static_argnames=("config", "train"), donate_argnames="state")
def train_step(
    state: TrainState, window_BT: Int[Array, "B _"], config: ModelConfig, train: TrainConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One update. Returns the new state (the old one is donated) and scalar metrics."""
    return updated(state, window_BT, config, train)[:2]
