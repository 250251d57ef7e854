"""The first stage: a vision tower learns to tell which characters each of its tokens holds.

Linear heads on its rows, which are left out afterwards, say for every slot of a token (`examples`) which character has
its centre there, if any, and which characters come before and after these. So the rows that reach the text model spell
the text already, a few characters each.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mimo_jax.config.towers import VisionConfig
from mimo_jax.errors import check_real, check_whole
from mimo_jax.modeling.vision import VisionTower, init_vision
from mimo_jax.training.optimizers import check_rate, learning_rate, make_optimizer
from mimo_jax.training.pretraining import TrainState
from mimo_jax.training.reading.examples import AFTER, BEFORE, CLASSES, NOTHING, SLOTS, Batch
from mimo_jax.weights import Params

HEADS = "heads"
WIDTHS = (SLOTS * CLASSES, (BEFORE + AFTER) * (CLASSES + 1))  # of the heads: a token's own characters, those around


@dataclasses.dataclass(frozen=True)
class CharacterConfig:
    """One run: `tokens` of the tower in a step. Slots without a character count for `nothing` of one with, and what is
    around a token's own characters for `around` of these.
    """

    steps: int
    tokens: int = 1024
    peak_rate: float = 4e-3
    warmup: int = 100
    decay_share: float = 0.3  # of the steps, at the end, in which the rate falls to zero
    weight_decay: float = 0.05
    nothing: float = 0.2
    around: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("characters", 1, steps=self.steps, tokens=self.tokens)
        check_whole("characters", 0, 2**32 - 1, seed=self.seed)
        check_whole("characters", 0, warmup=self.warmup)
        check_rate("characters", self.peak_rate)
        check_real("characters", 0, 1, decay_share=self.decay_share, weight_decay=self.weight_decay)
        check_real("characters", 0, 1000, nothing=self.nothing, around=self.around)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        decay = int(self.steps * self.decay_share)
        schedule = learning_rate(self.peak_rate, self.warmup, self.steps - decay, decay)
        rules = {"tower": make_optimizer(schedule, self.weight_decay), HEADS: optax.adamw(schedule, weight_decay=0.0)}
        return optax.partition(rules, {"vision": "tower", HEADS: HEADS})


def init_characters(config: VisionConfig, train: CharacterConfig, params: Params | None = None) -> TrainState:
    """The state before the first update: random parameters unless some are given, "vision" and those of the heads."""
    if params is None:
        tower, heads = jax.random.split(jax.random.key(train.seed))
        drawn = 0.02 * jax.random.normal(heads, (config.out_size, sum(WIDTHS)))
        params = {"vision": init_vision(config, tower), HEADS: drawn}
    return TrainState.begin(params, train.optimizer)


def rows_of(config: VisionConfig, tower: Params, batch: Batch) -> Float[Array, "B R D"]:
    """The tower's rows of each picture."""

    def of_picture(patches_SP: Array, places: Any) -> Array:
        return VisionTower(config).apply({"params": tower}, patches_SP[None], places)[0]

    return jax.vmap(of_picture)(jnp.asarray(batch.patches_BSP), batch.places)


def classes_of(
    config: VisionConfig, params: Params, batch: Batch
) -> tuple[Float[Array, "B R N K"], Float[Array, "B R A _"]]:
    """Logits of the classes of every slot, and of the characters around."""
    rows_BRD = rows_of(config, params["vision"], batch)
    own, around = jnp.split(rows_BRD @ params[HEADS], WIDTHS[:1], axis=-1)
    shape = rows_BRD.shape[:2]
    return own.reshape(*shape, SLOTS, CLASSES), around.reshape(*shape, BEFORE + AFTER, CLASSES + 1)


def loss_fn(params: Params, batch: Batch, config: VisionConfig, train: CharacterConfig):
    """Cross-entropy per slot and per character around, weighted; and the shares of both that were told right."""
    logits_BRNK, around_BRAK = classes_of(config, params, batch)
    is_real_BR1 = (jnp.arange(logits_BRNK.shape[1]) < batch.counts_B[:, None])[..., None]
    is_nothing = batch.labels_BRN == NOTHING
    weights = is_real_BR1 * jnp.where(is_nothing, train.nothing, 1.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BRNK, batch.labels_BRN)
    is_right = (jnp.argmax(logits_BRNK, axis=-1) == batch.labels_BRN) & ~is_nothing
    is_told = batch.around_BRA >= 0
    others = optax.softmax_cross_entropy_with_integer_labels(around_BRAK, jnp.maximum(batch.around_BRA, 0))
    is_around = (jnp.argmax(around_BRAK, axis=-1) == batch.around_BRA) & is_told
    loss = jnp.sum(weights * losses) / jnp.sum(weights) + train.around * jnp.mean(others, where=is_told)
    return loss, (jnp.sum(is_right) / jnp.sum(~is_nothing), jnp.sum(is_around) / jnp.sum(is_told))


@partial(jax.jit, static_argnames=("config", "train"), donate_argnames="state")
def character_step(
    state: TrainState, batch: Batch, config: VisionConfig, train: CharacterConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One update. Returns the new state (the old one is donated) and scalar metrics."""
    (loss, (right, around)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, config, train)
    metrics = {"loss": loss, "right": right, "around": around, "gradient_norm": optax.tree.norm(gradients)}
    return state.after(gradients, train.optimizer), metrics
