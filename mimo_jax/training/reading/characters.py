"""A vision tower learns to read: which characters each of its squares holds, and which token its row is to say.

Characters are told by linear heads on its rows, which are left out afterwards: they show the way to the tokens, which
are told by the rows alone, as near as they come to the embeddings of the text model (`rows.Voice`).
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
from mimo_jax.training.optimizers import check_rate, falling_rate, make_optimizer
from mimo_jax.training.pretraining import TrainState
from mimo_jax.training.reading.examples import CLASSES, NOTHING, SLOTS, Batch
from mimo_jax.training.reading.rows import SILENT, Voice
from mimo_jax.weights import Params

HEADS = "heads"
# Logits of what a row says, and of silence: a silent row gives each of some thousand tokens 0.
LOUD, QUIET = 24.0, 14.0


@dataclasses.dataclass(frozen=True)
class CharacterConfig:
    """One run: `tokens` of the tower in a step. What is empty, a slot or a row, counts for `nothing` of what is not,
    and characters for `spelling` of tokens.
    """

    steps: int
    tokens: int = 1024
    peak_rate: float = 4e-3
    warmup: int = 100
    decay_share: float = 0.3  # of the steps, at the end, in which the rate falls to zero
    weight_decay: float = 0.05
    nothing: float = 0.2
    spelling: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("characters", 1, steps=self.steps, tokens=self.tokens)
        check_whole("characters", 0, 2**32 - 1, seed=self.seed)
        check_whole("characters", 0, warmup=self.warmup)
        check_rate("characters", self.peak_rate)
        check_real("characters", 0, 1, decay_share=self.decay_share, weight_decay=self.weight_decay)
        check_real("characters", 0, 1000, nothing=self.nothing, spelling=self.spelling)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        schedule = falling_rate(self.peak_rate, self.warmup, self.steps, self.decay_share)
        rules = {"tower": make_optimizer(schedule, self.weight_decay), HEADS: optax.adamw(schedule, weight_decay=0.0)}
        return optax.partition(rules, {"vision": "tower", HEADS: HEADS})


def init_characters(config: VisionConfig, train: CharacterConfig, tower: Params | None = None) -> TrainState:
    """The state before the first update: random heads, and a random tower unless one is given."""
    for_tower, for_heads = jax.random.split(jax.random.key(train.seed))
    heads = 0.02 * jax.random.normal(for_heads, (config.out_size, SLOTS * CLASSES))
    tower = init_vision(config, for_tower) if tower is None else tower
    return TrainState.begin({"vision": tower, HEADS: heads}, train.optimizer)


def rows_of(config: VisionConfig, tower: Params, batch: Batch) -> Float[Array, "B R D"]:
    """The tower's rows of each picture."""

    def of_picture(patches_SP: Array, places: Any) -> Array:
        return VisionTower(config).apply({"params": tower}, patches_SP[None], places)[0]

    return jax.vmap(of_picture)(jnp.asarray(batch.patches_BSP), batch.places)


def loss_fn(params: Params, batch: Batch, voice: Voice, config: VisionConfig, train: CharacterConfig):
    """Cross-entropy per row plus that per slot, weighted; and the shares of tokens and of characters told right."""
    rows_BRD = rows_of(config, params["vision"], batch)
    logits_BRNK = (rows_BRD @ params[HEADS]).reshape(*batch.labels_BRN.shape, CLASSES)
    spelling, spelled = _told(logits_BRNK, jnp.asarray(batch.labels_BRN), NOTHING, batch, train.nothing)
    heard_BRC = LOUD * voice.heard(rows_BRD)
    quiet_BR1 = jnp.full((*heard_BRC.shape[:2], 1), QUIET)
    nothing = heard_BRC.shape[-1]
    said_BR = jnp.where(batch.said_BR == SILENT, nothing, batch.said_BR)
    saying, right = _told(jnp.concatenate([heard_BRC, quiet_BR1], axis=-1), said_BR, nothing, batch, train.nothing)
    return saying + train.spelling * spelling, (right, spelled)


def _told(logits: Array, labels: Array, nothing: int, batch: Batch, weight: float) -> tuple[Array, Array]:
    """The mean cross-entropy, in which `nothing` counts for `weight`, and the share of all else that was told right."""
    shape = (-1, batch.size, *[1] * (labels.ndim - 2))
    is_real = (jnp.arange(batch.size) < batch.counts_B[:, None]).reshape(shape)
    is_told = (labels != nothing) & is_real
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    weights = jnp.where(is_told, 1.0, weight * is_real)
    is_right = (jnp.argmax(logits, axis=-1) == labels) & is_told
    return jnp.sum(weights * losses) / jnp.sum(weights), jnp.sum(is_right) / jnp.sum(is_told)


@partial(jax.jit, static_argnames=("config", "train"), donate_argnames="state")
def character_step(
    state: TrainState, batch: Batch, voice: Voice, config: VisionConfig, train: CharacterConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One update. Returns the new state (the old one is donated) and scalar metrics."""
    (loss, (right, spelled)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, batch, voice, config, train
    )
    metrics = {"loss": loss, "right": right, "spelled": spelled, "gradient_norm": optax.tree.norm(gradients)}
    return state.after(gradients, train.optimizer), metrics
