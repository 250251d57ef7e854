"""A vision tower learns to read: which characters each of its squares holds, and which tokens its row is to say.

Characters are told by linear heads on its rows, which are left out afterwards: they show the way to the tokens, which
are told by the rows alone, as near as they come to the embeddings of the text model (`rows.Voice`): what tells tokens
apart leaves most of a row open, and the text model hears all of it.
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
from mimo_jax.training.reading.rows import SILENT, VOLUMES, Voice
from mimo_jax.weights import Params

HEADS = "heads"
# Logits of what a row says loudest, and of silence: a silent row gives each of some thousand tokens 0.
LOUD, QUIET = 24.0, 12.0


@dataclasses.dataclass(frozen=True)
class CharacterConfig:
    """One run: `tokens` of the tower in a step. A slot that is empty, for characters or tokens, counts for `nothing`,
    characters for `spelling` of tokens, and for `nearness` the squared distance from rows to what they are to be, in
    squares of an embedding's length.
    """

    steps: int
    tokens: int = 1024
    peak_rate: float = 4e-3
    warmup: int = 100
    decay_share: float = 0.5  # of the steps, at the end, in which the rate falls to zero
    weight_decay: float = 0.05
    nothing: float = 0.2
    spelling: float = 0.3
    nearness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("characters", 1, steps=self.steps, tokens=self.tokens)
        check_whole("characters", 0, 2**32 - 1, seed=self.seed)
        check_whole("characters", 0, warmup=self.warmup)
        check_rate("characters", self.peak_rate)
        check_real("characters", 0, 1, decay_share=self.decay_share, weight_decay=self.weight_decay)
        check_real("characters", 0, 1000, nothing=self.nothing, spelling=self.spelling, nearness=self.nearness)

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
    """Cross-entropy of tokens plus, weighted, that of characters and the distance; and the shares told right."""
    rows_BRD = rows_of(config, params["vision"], batch)
    logits_BRNK = (rows_BRD @ params[HEADS]).reshape(*batch.labels_BRN.shape, CLASSES)
    spelling, spelled = _told(logits_BRNK, jnp.asarray(batch.labels_BRN), NOTHING, batch, train.nothing)
    heard_BRC, said_BRN = voice.heard(rows_BRD), jnp.asarray(batch.said_BRN)
    nothing = heard_BRC.shape[-1]
    labels_BRN = jnp.where(said_BRN == SILENT, nothing, said_BRN)
    saying, right = _told(_remaining(heard_BRC, said_BRN), labels_BRN, nothing, batch, train.nothing)
    return saying + train.spelling * spelling + train.nearness * _distance(rows_BRD, voice, batch), (right, spelled)


def _distance(rows_BRD: Array, voice: Voice, batch: Batch) -> Array:
    """From rows to what they are to be, squared, in squares of an embedding's length; the mean over real rows."""
    wanted_BRD = voice.rows(jnp.asarray(batch.said_BRN), jnp.array(VOLUMES))
    squares_BR = jnp.sum((rows_BRD - wanted_BRD) ** 2, axis=-1) / jnp.sum(voice.mark_D**2)
    return jnp.sum(squares_BR * batch.is_real_BR) / jnp.sum(batch.is_real_BR)


def _remaining(heard_BRC: Array, said_BRN: Array) -> Float[Array, "B R N L"]:
    """Logits for what is the loudest without the tokens before it; the last one is that of silence."""
    is_said_BRNC = jax.nn.one_hot(said_BRN, heard_BRC.shape[-1])
    is_taken_BRNC = (jnp.cumsum(is_said_BRNC, axis=2) > is_said_BRNC) & (is_said_BRNC == 0)
    logits_BRNC = jnp.where(is_taken_BRNC, -jnp.inf, LOUD * heard_BRC[:, :, None])
    return jnp.pad(logits_BRNC, [(0, 0)] * 3 + [(0, 1)], constant_values=QUIET)


def _told(logits: Array, labels: Array, nothing: int, batch: Batch, weight: float) -> tuple[Array, Array]:
    """The mean cross-entropy, in which `nothing` counts for `weight`, and the share of all else that was told right."""
    is_real = batch.is_real_BR[:, :, None]
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
