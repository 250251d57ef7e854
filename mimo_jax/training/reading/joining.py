"""The second stage: tower and text model learn together to write down what a picture says.

A sequence is what `media.prompt` makes of an image, then its text. Of the text model attention, norms and dense layers
learn: experts, embeddings and head stay as they are, and so do packed weights in files. What it says of plain text is
held where it was: by the divergence from the model before, on windows of the corpus. Small pictures come first: among
few rows it is sooner found which one comes next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int

from mimo_jax.config.model import ModelConfig
from mimo_jax.errors import check_real, check_whole
from mimo_jax.modeling.backbone import MEDIA, Backbone
from mimo_jax.tokenizer import END_OF_TEXT, Tokenizer
from mimo_jax.training.optimizers import check_rate, learning_rate, make_optimizer
from mimo_jax.training.pretraining import TrainState, cross_entropy
from mimo_jax.training.reading.characters import rows_of
from mimo_jax.training.reading.examples import TEXT_TOKENS, Batch, Example
from mimo_jax.weights import Params

LEARNING = ("attention", "input_norm", "post_norm", "mlp")  # of a layer of the text model
CURRICULUM = {0.4: (64,), 0.6: (64, 128), 1.0: (64, 128, 256)}  # sizes of pictures up to a share of the steps


@dataclasses.dataclass(frozen=True)
class JoinConfig:
    """One run: `rows` of pictures and `windows` of `length` tokens of plain text in a step."""

    steps: int
    rows: int = 1024
    windows: int = 1
    length: int = 256
    tower_rate: float = 2e-3
    text_rate: float = 1e-3
    warmup: int = 100
    decay_share: float = 0.4  # of the steps, at the end, in which rates fall to zero
    weight_decay: float = 0.0
    faithful: float = 1.0  # weight of the divergence on plain text
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("join", 1, steps=self.steps, rows=self.rows, windows=self.windows)
        check_whole("join", 2, length=self.length)
        check_whole("join", 0, 2**32 - 1, seed=self.seed)
        check_whole("join", 0, warmup=self.warmup)
        for rate in (self.tower_rate, self.text_rate):
            check_rate("join", rate)
        check_real("join", 0, 1, decay_share=self.decay_share, weight_decay=self.weight_decay)
        check_real("join", 0, 1000, faithful=self.faithful)

    def sizes_at(self, step: int) -> tuple[int, ...]:
        """Of pictures, by `CURRICULUM`."""
        return next(sizes for share, sizes in CURRICULUM.items() if step < share * self.steps or share == 1.0)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        decay = int(self.steps * self.decay_share)

        def rule(peak: float) -> optax.GradientTransformation:
            return make_optimizer(learning_rate(peak, self.warmup, self.steps - decay, decay), self.weight_decay)

        rules = {"tower": rule(self.tower_rate), "text": rule(self.text_rate)}
        return optax.partition(rules, lambda params: {name: "tower" if name == "vision" else "text" for name in params})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transcripts:
    """Sequences of a batch of pictures: ids, those beyond the vocabulary for rows, and which of them are to be told."""

    tokens_BT: Int[np.ndarray, "B T"]
    is_told_BT: Bool[np.ndarray, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lesson:
    """What an update learns from: pictures, their transcripts, and windows of plain text."""

    pictures: Batch
    told: Transcripts
    window_BT: Int[np.ndarray, "_ _"]


def learning(text: Params) -> Params:
    """What learns of a text model."""
    return {
        name: {part: layer[part] for part in LEARNING if part in layer}
        for name, layer in text.items()
        if name.startswith("layers_")
    }


def merged(text: Params, learnt: Params) -> Params:
    """The text model with what has learnt in its place."""
    layers = {name: {**text[name], **parts} for name, parts in learnt.items() if name != "vision"}
    return {**text, **layers}


def init_join(text: Params, tower: Params, train: JoinConfig) -> TrainState:
    """The state of what learns: the tower's parameters, "vision", and of the text model what `learning` takes."""
    return TrainState.begin({"vision": tower, **learning(text)}, train.optimizer)


def transcripts(found: Sequence[Example], config: ModelConfig, tokenizer: Tokenizer, size: int) -> Transcripts:
    """Of pictures of at most `size` rows."""
    assert config.media is not None
    end = tokenizer.id_of(END_OF_TEXT)
    tokens = np.full((len(found), size + 2 + TEXT_TOKENS[size]), end, np.int32)
    is_told = np.zeros(tokens.shape, bool)
    for place, example in enumerate(found):
        first = config.vocab_size + place * size
        told = [*tokenizer.encode(example.text, literal=True), end]
        shown = [config.media.vision_start, *range(first, first + example.count), config.media.vision_end]
        tokens[place, : len(shown) + len(told)] = shown + told
        is_told[place, len(shown) : len(shown) + len(told)] = True
    return Transcripts(tokens, is_told)


def loss_fn(params: Params, text: Params, lesson: Lesson, config: ModelConfig, train: JoinConfig):
    """Nats per token of the transcripts, plus the weighted divergence on plain text; and both, and how many tokens of
    the transcripts were the likeliest.
    """
    assert config.vision is not None
    rows_BRD, told = rows_of(config.vision, params["vision"], lesson.pictures), lesson.told
    own = merged(text, params)
    apply = Backbone(config).apply
    seeing: Any = {"params": {**own, MEDIA: rows_BRD.reshape(-1, rows_BRD.shape[-1])}}
    logits_BTC, _, _ = apply(seeing, told.tokens_BT[:, :-1])
    targets_BT = jnp.where(told.is_told_BT, told.tokens_BT, 0)[:, 1:]
    is_told_BT = told.is_told_BT[:, 1:]
    count = jnp.sum(is_told_BT)
    loss = jnp.sum(cross_entropy(logits_BTC, targets_BT) * is_told_BT) / count
    right = jnp.sum((jnp.argmax(logits_BTC, axis=-1) == targets_BT) & is_told_BT) / count
    before, after = (jax.nn.log_softmax(apply({"params": one}, lesson.window_BT)[0]) for one in (text, own))
    before = jax.lax.stop_gradient(before)
    divergence = jnp.mean(jnp.sum(jnp.exp(before) * (before - after), axis=-1))
    return loss + train.faithful * divergence, (loss, divergence, right)


@partial(jax.jit, static_argnames=("config", "train"), donate_argnames="state")
def join_step(
    state: TrainState, text: Params, lesson: Lesson, config: ModelConfig, train: JoinConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One update. Returns the new state (the old one is donated) and scalar metrics."""
    gradients, (loss, divergence, right) = jax.grad(loss_fn, has_aux=True)(state.params, text, lesson, config, train)
    metrics = {
        "loss": loss,
        "divergence": divergence,
        "right": right,
        "gradient_norm": optax.tree.norm(gradients),
    }
    return state.after(gradients, train.optimizer), metrics
