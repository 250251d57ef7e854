"""Quantisation-aware training (QAT): which way each expert weight is rounded is learnt beside the model itself.

The float32 masters learn from text exactly as they do without QAT. Every expert weight also has an offset, added before
it is rounded. A second forward pass sees the experts as their exported MXFP4 bytes will decode, and the gradient of its
distance to the first, KL(masters || rounded), passes straight through the rounding to the offsets alone: a target
without the noise of text, which the masters' learning cannot drown. Learnt rounding: arXiv 2004.10568.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mimo_jax.config.model import ModelConfig
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.training.optimizers import make_optimizer
from mimo_jax.training.pretraining import TrainConfig, TrainState, init_state, updated
from mimo_jax.weights import Params, fake_quantize
from mimo_jax.weights.params import is_expert


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QatState:
    """The state of the training as it is without QAT, and the offsets of the experts with their optimiser."""

    masters: TrainState
    offsets: Params
    optimizer: Any

    @property
    def step(self) -> Int[Array, ""]:
        return self.masters.step

    @property
    def params(self) -> Params:
        """What an export rounds: masters plus offsets."""
        return shifted(self.masters.params, self.offsets)


def shifted(params: Params, offsets: Params) -> Params:
    """Parameters with the offsets added to the experts; `offsets` has None in place of everything else."""

    def add(offset, leaf):
        return leaf if offset is None else leaf + offset

    return jax.tree.map(add, offsets, params, is_leaf=lambda leaf: leaf is None)


def quantize_experts(params: Params, rule: str = "even") -> Params:
    """Parameters as the quantised checkpoint will read; differentiable, straight through."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fake_quantize(leaf, rule) if is_expert(path) else leaf, params
    )


def offset_optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """Offsets begin where the descent begins; their rate falls with it, without a warm-up."""
    return make_optimizer(optax.linear_schedule(train.peak_rate, 0.0, train.decay_steps), weight_decay=0.0)


def begin(masters: TrainState, train: TrainConfig) -> QatState:
    """QAT of a model at any point of its training, with offsets of zero."""
    offsets = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if is_expert(path) else None, masters.params
    )
    return QatState(masters, offsets, offset_optimizer(train).init(offsets))


def init_qat(config: ModelConfig, train: TrainConfig) -> QatState:
    """The state that `begin` makes of fresh parameters."""
    return begin(init_state(config, train), train)


def divergence(teacher_BTC: Float[Array, "B T C"], logits_BTC: Float[Array, "B T C"]) -> Float[Array, "B T"]:
    """KL(teacher || model) per position from logits, in nats."""
    return optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(logits_BTC), jax.nn.log_softmax(teacher_BTC))


def rounding_loss(
    offsets: Params,
    params: Params,
    masters_BTC: Float[Array, "B T C"],
    tokens_BT: Int[Array, "B T"],
    config: ModelConfig,
    rule: str = "even",
) -> Float[Array, ""]:
    """Mean distance of the rounded experts' predictions to the masters', in nats per token."""
    rounded = quantize_experts(shifted(params, offsets), rule)
    logits_BTC, _, _ = Backbone(config).apply({"params": rounded}, tokens_BT)
    return jnp.mean(divergence(masters_BTC, logits_BTC))


@partial(jax.jit, static_argnames=("config", "train"), donate_argnames="state")
def qat_step(
    state: QatState, window_BT: Int[Array, "B _"], config: ModelConfig, train: TrainConfig
) -> tuple[QatState, dict[str, Array]]:
    """One update of the masters and one of the offsets. Returns the new state (the old one is donated) and metrics."""
    masters, metrics, masters_BTC = updated(state.masters, window_BT, config, train)
    distance, gradients = jax.value_and_grad(rounding_loss)(
        state.offsets, state.masters.params, masters_BTC, window_BT[:, :-1], config, train.scale_rule
    )
    updates, optimizer = offset_optimizer(train).update(gradients, state.optimizer, state.offsets)
    offsets: Any = optax.apply_updates(state.offsets, updates)
    return QatState(masters, offsets, optimizer), {**metrics, "rounding_loss": distance}
