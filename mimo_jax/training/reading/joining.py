"""The last stage: tower and text model write pictures down together, each having learnt what rows say.

Of the text model the same learns as in `copying`, and what it says of plain text is held where it was. Later it writes
on from what it wrote, right or wrong: so of the tokens that it is shown a few are others, and it learns to find its
place again.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from mimo_jax.config.model import ModelConfig
from mimo_jax.errors import check_real
from mimo_jax.training.pretraining import TrainState
from mimo_jax.training.reading.characters import rows_of
from mimo_jax.training.reading.copying import (
    LessonConfig,
    Transcripts,
    learning,
    merged,
    plain_divergence,
    transcript_loss,
)
from mimo_jax.training.reading.examples import Batch
from mimo_jax.weights import Params


@dataclasses.dataclass(frozen=True)
class JoinConfig(LessonConfig):
    """Of the tokens of the transcripts that the text model is shown, a share of `slips` is another one."""

    stage = "join"

    warmup: int = 50
    faithful: float = 20.0
    slips: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real(self.stage, 0, 1, slips=self.slips)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lesson:
    """What an update learns from: pictures, their transcripts, and windows of plain text."""

    pictures: Batch
    told: Transcripts
    window_BT: Int[np.ndarray, "_ _"]


def init_join(text: Params, tower: Params, train: JoinConfig) -> TrainState:
    """The state before the first update, with arrays of its own."""
    return TrainState.begin(jax.tree.map(jnp.array, {**learning(text), "vision": tower}), train.optimizer)


def joined(text: Params, learnt: Params) -> Params:
    """The text model and its tower with what has learnt in its place."""
    own = {name: parts for name, parts in learnt.items() if name != "vision"}
    return {**merged(text, own), "vision": learnt["vision"]}


def slipped(told: Transcripts, share: float, rng: np.random.Generator) -> Transcripts:
    """With a share of the tokens that are told shown as others of theirs."""
    is_other_BT = told.is_told_BT & (rng.random(told.is_told_BT.shape) < share)
    others_BT = rng.choice(told.tokens_BT[told.is_told_BT], told.tokens_BT.shape)
    return dataclasses.replace(told, shown_BT=np.where(is_other_BT, others_BT, told.tokens_BT))


def loss_fn(params: Params, text: Params, lesson: Lesson, config: ModelConfig, train: JoinConfig):
    """Nats per token of the transcripts, plus the weighted divergence on plain text; and these two, and how many tokens
    of the transcripts were the likeliest.
    """
    assert config.vision is not None
    own = joined(text, params)
    loss, right = transcript_loss(own, rows_of(config.vision, own["vision"], lesson.pictures), lesson.told, config)
    moved = plain_divergence(text, own, jnp.asarray(lesson.window_BT), config)
    return loss + train.faithful * moved, (loss, moved, right)


@partial(jax.jit, static_argnames=("config", "train"), donate_argnames="state")
def join_step(
    state: TrainState, text: Params, lesson: Lesson, config: ModelConfig, train: JoinConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One update; `text` as it was before it learnt anything of pictures. Returns the new state (the old one is
    donated) and scalar metrics.
    """
    gradients, (loss, moved, right) = jax.grad(loss_fn, has_aux=True)(state.params, text, lesson, config, train)
    metrics = {"loss": loss, "divergence": moved, "right": right, "gradient_norm": optax.tree.norm(gradients)}
    return state.after(gradients, train.optimizer), metrics
