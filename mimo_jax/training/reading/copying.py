"""The text model learns to write down what the rows of a picture say, before there is a tower that says it.

Rows are made from the text itself (`rows`), for a picture that nobody draws, and spoilt a little, as those of a tower
will be. Attention and norms learn: experts, dense layers, embeddings and head stay as they are, and so do packed
weights in files. What the model says of plain text is held where it was: by the divergence from the model before, on
windows of the corpus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from mimo_jax.config.model import ModelConfig
from mimo_jax.errors import check_real, check_whole
from mimo_jax.modeling.backbone import MEDIA, Backbone
from mimo_jax.tokenizer import END_OF_TEXT
from mimo_jax.training.optimizers import check_rate, falling_rate, make_optimizer
from mimo_jax.training.pretraining import TrainState, cross_entropy
from mimo_jax.training.qat import divergence
from mimo_jax.training.reading.examples import SIZES, TEXT_TOKENS, Reader, fits
from mimo_jax.training.reading.pictures import EMS, grid_of
from mimo_jax.training.reading.rows import SILENT, VOLUMES, Voice, said, transcript
from mimo_jax.training.reading.snippets import snippet
from mimo_jax.weights import Params

LEARNING = ("attention", "input_norm", "post_norm")  # of a layer
ADVANCES = (0.58, 0.66)  # ems; fonts of one width have 0.6
TALLEST = 1.2  # ems from the top of a font to its bottom, or so


@dataclasses.dataclass(frozen=True)
class LessonConfig:
    """One run in which the text model learns: `rows` of pictures and `windows` of `length` tokens of plain text in a
    step.
    """

    stage: ClassVar[str]  # as errors name it

    steps: int
    rows: int = 1024
    windows: int = 4
    length: int = 256
    peak_rate: float = 1e-3
    warmup: int = 20
    decay_share: float = 0.5  # of the steps, at the end, in which the rate falls to zero
    faithful: float = 4.0  # weight of the divergence on plain text
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self.stage, 1, steps=self.steps, rows=self.rows, windows=self.windows)
        check_whole(self.stage, 2, length=self.length)
        check_whole(self.stage, 0, 2**32 - 1, seed=self.seed)
        check_whole(self.stage, 0, warmup=self.warmup)
        check_rate(self.stage, self.peak_rate)
        check_real(self.stage, 0, 1, decay_share=self.decay_share)
        check_real(self.stage, 0, 1000, faithful=self.faithful)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows + self.windows * self.length

    @property
    def optimizer(self) -> optax.GradientTransformation:
        schedule = falling_rate(self.peak_rate, self.warmup, self.steps, self.decay_share)
        return make_optimizer(schedule, weight_decay=0.0)


@dataclasses.dataclass(frozen=True)
class CopyConfig(LessonConfig):
    """Of the tokens that rows say, a share of `wrong` is another one, volumes are off by up to `unsteady` of
    themselves, and all rows have noise, `noise` of an embedding's standard deviation.
    """

    stage = "copying"

    wrong: float = 0.03
    unsteady: float = 0.1
    noise: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real(self.stage, 0, 1, wrong=self.wrong, unsteady=self.unsteady)
        check_real(self.stage, 0, 1000, noise=self.noise)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transcripts:
    """Sequences of a batch of pictures: ids, those beyond the vocabulary for rows, and which of them are to be told.
    What the model is shown of them can differ from what it is to tell.
    """

    shown_BT: Int[np.ndarray, "B T"]
    tokens_BT: Int[np.ndarray, "B T"]
    is_told_BT: Bool[np.ndarray, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lesson:
    """What an update learns from: what rows say, the transcripts, and windows of plain text."""

    said_BRN: Int[np.ndarray, "B R N"]
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
    return {**text, **{name: {**text[name], **parts} for name, parts in learnt.items()}}


def init_copying(text: Params, train: CopyConfig) -> TrainState:
    """The state before the first update, with arrays of its own."""
    return TrainState.begin(jax.tree.map(jnp.array, learning(text)), train.optimizer)


def layouts(reader: Reader, rng: np.random.Generator, size: int) -> Iterator[Int[np.ndarray, "R N"]]:
    """What the rows of pictures of at most `size` squares say. Nothing is drawn."""
    while True:
        lines = snippet(reader.tokens, reader.tokenizer, rng, SIZES[size])
        em = int(rng.integers(EMS[0], EMS[1] + 1))
        grid = grid_of(lines, em, em * rng.uniform(*ADVANCES), em * TALLEST, rng)
        rows, columns = (max(1, round(side / reader.vision.token_side)) for side in (grid.height, grid.width))
        found = said(lines, reader.tokenizer, grid, rows, columns)
        if found is not None and fits(found, size):
            yield found


def lesson(
    config: ModelConfig, reader: Reader, train: CopyConfig, windows: Callable[[int], np.ndarray], step: int
) -> Lesson:
    """What a step learns from; it depends on (seed, step) alone. `windows(step)` are of plain text."""
    rng = np.random.default_rng((train.seed, step))
    size = int(rng.choice(list(SIZES)))
    said_BRN = np.full((max(1, train.rows // size), size, len(VOLUMES)), SILENT, np.int32)
    ids, counts = list[tuple[int, ...]](), list[int]()
    for row, found in zip(said_BRN, layouts(reader, rng, size)):
        row[: len(found)] = found
        counts.append(len(found))
        ids.append(transcript(found))
    is_wrong = (rng.random(said_BRN.shape) < train.wrong) & (said_BRN != SILENT)
    said_BRN[is_wrong] = rng.integers(0, config.vocab_size, int(is_wrong.sum()))
    return Lesson(said_BRN, transcripts(ids, counts, size, config, reader.tokenizer.id_of(END_OF_TEXT)), windows(step))


def transcripts(
    ids: Sequence[Sequence[int]], counts: Sequence[int], size: int, config: ModelConfig, end: int
) -> Transcripts:
    """Of texts of these tokens, in pictures of `counts` rows each, which lie `size` apart."""
    assert config.media is not None
    tokens = np.full((len(ids), size + 2 + TEXT_TOKENS[size]), end, np.int32)
    is_told = np.zeros(tokens.shape, bool)
    for place, (own, count) in enumerate(zip(ids, counts)):
        first = config.vocab_size + place * size
        shown = [config.media.vision_start, *range(first, first + count), config.media.vision_end]
        told = [*own, end]
        tokens[place, : len(shown) + len(told)] = shown + told
        is_told[place, len(shown) : len(shown) + len(told)] = True
    return Transcripts(tokens, tokens, is_told)


def transcript_loss(
    text: Params, rows_BRD: Float[Array, "B R D"], told: Transcripts, config: ModelConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Nats per token that is to be told, and how many of them were the likeliest."""
    seeing: Any = {"params": {**text, MEDIA: rows_BRD.reshape(-1, rows_BRD.shape[-1])}}
    logits_BTC, _, _ = Backbone(config).apply(seeing, told.shown_BT[:, :-1])
    targets_BT = jnp.where(told.is_told_BT, told.tokens_BT, 0)[:, 1:]
    is_told_BT = told.is_told_BT[:, 1:]
    count = jnp.sum(is_told_BT)
    loss = jnp.sum(cross_entropy(logits_BTC, targets_BT) * is_told_BT) / count
    return loss, jnp.sum((jnp.argmax(logits_BTC, axis=-1) == targets_BT) & is_told_BT) / count


def loss_fn(
    params: Params, text: Params, key: Array, lesson: Lesson, voice: Voice, config: ModelConfig, train: CopyConfig
):
    """Nats per token of the transcripts, plus the weighted divergence on plain text; and these two, and how many tokens
    of the transcripts were the likeliest.
    """
    own = merged(text, params)
    for_volumes, for_noise = jax.random.split(key)
    off_BRN = train.unsteady * jax.random.uniform(for_volumes, lesson.said_BRN.shape, minval=-1.0)
    rows_BRD = voice.rows(jnp.asarray(lesson.said_BRN), jnp.array(VOLUMES) * (1 + off_BRN))
    rows_BRD += train.noise * jnp.std(voice.embed_CD) * jax.random.normal(for_noise, rows_BRD.shape)
    loss, right = transcript_loss(own, rows_BRD, lesson.told, config)
    moved = plain_divergence(text, own, jnp.asarray(lesson.window_BT), config)
    return loss + train.faithful * moved, (loss, moved, right)


def plain_divergence(
    before: Params, after: Params, window_BT: Int[Array, "_ _"], config: ModelConfig
) -> Float[Array, ""]:
    """Nats per token by which what is said of plain text has moved."""
    before_BTC, after_BTC = (Backbone(config).apply({"params": one}, window_BT)[0] for one in (before, after))
    return jnp.mean(divergence(before_BTC, after_BTC))


@partial(jax.jit, static_argnames=("config", "train"), donate_argnames="state")
def copy_step(
    state: TrainState, text: Params, lesson: Lesson, voice: Voice, config: ModelConfig, train: CopyConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One update. Returns the new state (the old one is donated) and scalar metrics."""
    key = jax.random.fold_in(jax.random.key(train.seed), state.step)
    gradients, (loss, moved, right) = jax.grad(loss_fn, has_aux=True)(
        state.params, text, key, lesson, voice, config, train
    )
    metrics = {"loss": loss, "divergence": moved, "right": right, "gradient_norm": optax.tree.norm(gradients)}
    return state.after(gradients, train.optimizer), metrics
