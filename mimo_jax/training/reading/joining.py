"""The last stage: the tower learns, through the text model, to say what that one needs to write a picture down.

The text model stays as it is, to the bit: it has learnt its part before (`copying`).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import optax
from jaxtyping import Array

from mimo_jax.config.model import ModelConfig
from mimo_jax.errors import check_real, check_whole
from mimo_jax.training.optimizers import check_rate, falling_rate, make_optimizer
from mimo_jax.training.pretraining import TrainState
from mimo_jax.training.reading.characters import rows_of
from mimo_jax.training.reading.copying import Transcripts, transcript_loss
from mimo_jax.training.reading.examples import Batch
from mimo_jax.weights import Params


@dataclasses.dataclass(frozen=True)
class JoinConfig:
    """One run: `rows` of pictures in a step."""

    steps: int
    rows: int = 1024
    peak_rate: float = 1e-3
    warmup: int = 50
    decay_share: float = 0.5  # of the steps, at the end, in which the rate falls to zero
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("join", 1, steps=self.steps, rows=self.rows)
        check_whole("join", 0, 2**32 - 1, seed=self.seed)
        check_whole("join", 0, warmup=self.warmup)
        check_rate("join", self.peak_rate)
        check_real("join", 0, 1, decay_share=self.decay_share, weight_decay=self.weight_decay)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        schedule = falling_rate(self.peak_rate, self.warmup, self.steps, self.decay_share)
        return make_optimizer(schedule, self.weight_decay)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lesson:
    """What an update learns from: pictures and their transcripts."""

    pictures: Batch
    told: Transcripts


def init_join(tower: Params, train: JoinConfig) -> TrainState:
    """The state before the first update."""
    return TrainState.begin(tower, train.optimizer)


def loss_fn(tower: Params, text: Params, lesson: Lesson, config: ModelConfig):
    """Nats per token of the transcripts, and how many of them were the likeliest."""
    assert config.vision is not None
    return transcript_loss(text, rows_of(config.vision, tower, lesson.pictures), lesson.told, config)


@partial(jax.jit, static_argnames=("config", "train"), donate_argnames="state")
def join_step(
    state: TrainState, text: Params, lesson: Lesson, config: ModelConfig, train: JoinConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One update. Returns the new state (the old one is donated) and scalar metrics."""
    (loss, right), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, text, lesson, config)
    metrics = {"loss": loss, "right": right, "gradient_norm": optax.tree.norm(gradients)}
    return state.after(gradients, train.optimizer), metrics
