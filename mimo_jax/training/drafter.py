"""Training of the DFlash drafter on text of its target: random anchors, one block behind each, one step of denoising.

A block behind anchor position a learns the tokens at a + 1 ... a + 7 from the context strictly before a, through the
same code that drafts at inference. The target's features are computed on the fly and get no gradient.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from mimo_jax.cache import LayerCache
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import LONGEST_MATCH, DrafterConfig
from mimo_jax.errors import UserError
from mimo_jax.lookup import continuation
from mimo_jax.model import Model
from mimo_jax.modeling.attention import heads_first
from mimo_jax.modeling.backbone import Backbone, Params
from mimo_jax.modeling.drafter import Drafter, KeysValues, abstract_drafter, init_drafter
from mimo_jax.modeling.layers import linear
from mimo_jax.sharding import place_batch
from mimo_jax.tokenizer import MASK, Tokenizer
from mimo_jax.training.corpus import batch_at, shuffled
from mimo_jax.training.optimizers import OPTIMIZERS, make_optimizer
from mimo_jax.training.pretraining import TrainState, cross_entropy
from mimo_jax.training.run import Metrics, Update, read_run, restore
from mimo_jax.training.selfgen import Texts

# loss -> (share of cross-entropy with the text, with the target's distribution, of the L1 distance to that; weights of
# the slots)
LOSSES = {
    "soft": (0.0, 1.0, 0.0, "decay"),  # distillation, arXiv 1503.02531
    "soft-dpace": (0.0, 1.0, 0.0, "dpace"),
    "decay": (1.0, 0.0, 0.0, "decay"),  # DFlash, arXiv 2602.06036
    "dpace": (1.0, 0.0, 0.0, "dpace"),  # D-PACE, arXiv 2605.18810
    "tv": (0.1, 0.0, 0.9, "decay"),  # DSpark, arXiv 2607.05147
}
KINDS = ("block", "chain")
DPACE_FLOOR = 0.5  # alpha of D-PACE


@dataclasses.dataclass(frozen=True)
class DraftTrainConfig:
    """One run of `steps` updates: `batch` sequences per step, `anchors` blocks in each."""

    steps: int
    batch: int = 16
    anchors: int = 24
    kind: str = "block"  # or "chain": the autoregressive control, see `baselines.ChainDrafter`
    loss: str = "soft"
    gamma: float = 4.0  # of the decay exp(-(k - 1) / gamma); 4 is the paper's for blocks of 8
    optimizer: str = "muon"
    peak_rate: float = 5e-3
    warmup_share: float = 0.04
    weight_decay: float = 0.1
    human_share: float = 0.0  # of the sequences, taken from the corpus instead of the target's own text
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.human_share <= 1:
            raise UserError(f"drafter: human_share={self.human_share} must lie in 0..1")
        for field, choices in (("kind", KINDS), ("loss", LOSSES), ("optimizer", OPTIMIZERS)):
            if getattr(self, field) not in choices:
                raise UserError(f"drafter: {field}={getattr(self, field)!r} must be one of {', '.join(choices)}")
        for field in ("steps", "batch", "anchors", "gamma", "peak_rate"):
            if getattr(self, field) <= 0:
                raise UserError(f"drafter: {field}={getattr(self, field)} must be positive")

    @property
    def schedule(self) -> optax.Schedule:
        warmup = max(1, int(self.warmup_share * self.steps))
        return optax.warmup_cosine_decay_schedule(0.0, self.peak_rate, warmup, max(self.steps, warmup + 1))


def init_state(config: DrafterConfig, train: DraftTrainConfig, params: Params | None = None) -> TrainState:
    """The state before the first update: random parameters unless float32 `params` are given."""
    params = init_drafter(config, jax.random.key(train.seed)) if params is None else params
    optimizer = make_optimizer(train.schedule, train.weight_decay, train.optimizer)
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def draw_anchors(
    key: Array, starts_B: Int[Array, "B"], ends_B: Int[Array, "B"], length: int, count: int
) -> tuple[Int[Array, "B A"], Bool[Array, "B A"]]:
    """`count` distinct positions per row, whose own and next token the target wrote; False where a row has too few."""
    position_T = jnp.arange(length)
    eligible_BT = (position_T >= starts_B[:, None]) & (position_T < ends_B[:, None] - 1)
    lots_BT = jnp.where(eligible_BT, jax.random.uniform(key, eligible_BT.shape), -1.0)
    drawn_BA, anchors_BA = jax.lax.top_k(lots_BT, count)
    return anchors_BA, drawn_BA >= 0


def draft_hidden(
    params: Params,
    config: DrafterConfig,
    kind: str,
    embed_CD: Float[Array, "C D"],
    taps_BTZ: Float[Array, "B T Z"],
    tokens_BT: Int[Array, "B T"],
    anchors_BA: Int[Array, "B A"],
) -> Float[Array, "P M D"]:
    """Hidden rows that predict the tokens behind every anchor; P runs over rows, then anchors.

    Each block gets a copy of the context window before it, so that no mask over all blocks and keys is ever built.
    """
    apply = partial(Drafter(config).apply, {"params": params})
    blocks, drafts = anchors_BA.size, config.block_size - 1
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    layers = apply(taps_BTZ, positions_BT, method="context")
    before_BAW = anchors_BA[..., None] + jnp.arange(-config.window, 0)  # negative: nothing there, never visible
    windows = tuple(_gather_windows(layer, before_BAW) for layer in layers)
    before_PW, starts_P = before_BAW.reshape(blocks, -1), anchors_BA.reshape(-1)
    if kind == "chain":
        places_BAM = jnp.minimum(anchors_BA[..., None] + jnp.arange(drafts), tokens_BT.shape[1] - 1)
        x_PMD = embed_CD[_at(tokens_BT, places_BAM)].reshape(blocks, drafts, -1)
        return apply(x_PMD, starts_P, windows, before_PW, causal=True, method="read")[0]
    anchor_PD = embed_CD[_at(tokens_BT, anchors_BA)].reshape(blocks, -1)
    guesses = None
    if config.lookup:
        look_up = partial(continuation, longest=LONGEST_MATCH, count=drafts)
        tokens_BAM, matched_BA = jax.vmap(jax.vmap(look_up, in_axes=(None, 0)))(tokens_BT, anchors_BA)
        guesses = embed_CD[tokens_BAM].reshape(blocks, drafts, -1), matched_BA.reshape(-1)
    return apply(anchor_PD, starts_P, windows, before_PW, guesses)[:, 1:]


def _at(values: Array, places: Int[Array, "B ..."]) -> Array:
    """Each row's entries of `values` [B, T, ...] at its places."""
    rows = jnp.arange(values.shape[0]).reshape(-1, *[1] * (places.ndim - 1))
    return values[rows, places]


def _gather_windows(layer: KeysValues, positions_BAW: Array) -> LayerCache:
    def gather(x_BTKQ: Array) -> Array:
        picked = _at(x_BTKQ, jnp.maximum(positions_BAW, 0))
        return heads_first(picked.reshape(-1, *picked.shape[2:]))

    keys, values = map(gather, layer)
    return LayerCache(keys, values)


def slot_weights(
    kind: str, loss_PM: Float[Array, "P M"], valid_PM: Bool[Array, "P M"], gamma: float
) -> Float[Array, "P M"]:
    """How much each slot counts. Without a gradient.

    "decay": exp(-(k - 1) / gamma). "dpace": sum over m >= k of prod over i <= m of ((1 - a) q_i + a), q = exp(-loss):
    the share of the expected accepted length that hangs on slot k.
    """
    if kind == "decay":
        return valid_PM * jnp.exp(-jnp.arange(loss_PM.shape[1]) / gamma)
    smoothed_PM = (1 - DPACE_FLOOR) * jnp.exp(-jax.lax.stop_gradient(loss_PM)) + DPACE_FLOOR
    reach_PM = jnp.cumprod(smoothed_PM, axis=1) * valid_PM
    return valid_PM * jnp.cumsum(reach_PM[:, ::-1], axis=1)[:, ::-1]


def loss_fn(
    params: Params,
    key: Array,
    target_params: Params,
    batch: Texts,
    target: ModelConfig,
    config: DrafterConfig,
    train: DraftTrainConfig,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The objective over all valid slots, and metrics; `accepted` is the drafts per block that equal the text."""
    tokens_BT = jnp.asarray(batch.tokens, jnp.int32)
    starts_B, ends_B = jnp.asarray(batch.starts), jnp.asarray(batch.ends)
    backbone = Backbone(target, config.target_layer_ids)
    target_BTC, features, _ = jax.lax.stop_gradient(backbone.apply({"params": target_params}, tokens_BT))
    anchors_BA, drawn_BA = draw_anchors(key, starts_B, ends_B, tokens_BT.shape[1], train.anchors)
    embed_CD = target_params["embed"]
    hidden_PMD = draft_hidden(params, config, train.kind, embed_CD, features.taps, tokens_BT, anchors_BA)
    logits_PMC = linear(hidden_PMD, target_params["head"], jnp.float32)[..., : config.vocab_size]

    places_BAM = anchors_BA[..., None] + jnp.arange(1, config.block_size)
    valid_PM = ((places_BAM < ends_B[:, None, None]) & drawn_BA[..., None]).reshape(-1, config.block_size - 1)
    places_BAM = jnp.minimum(places_BAM, tokens_BT.shape[1] - 1)
    labels_PM = _at(tokens_BT, places_BAM).reshape(valid_PM.shape)
    if config.bias_rank:
        previous_PM = _at(tokens_BT, places_BAM - 1).reshape(valid_PM.shape)
        logits_PMC += Drafter(config).apply({"params": params}, previous_PM, method="bias")

    text_share, target_share, distance_share, weighting = LOSSES[train.loss]
    ce_PM = cross_entropy(logits_PMC, labels_PM)
    objective_PM = text_share * ce_PM
    if target_share or distance_share:
        law_PMC = jax.nn.softmax(_at(target_BTC, places_BAM - 1), axis=-1).reshape(logits_PMC.shape)
        log_q_PMC = jax.nn.log_softmax(logits_PMC, axis=-1)
        objective_PM -= target_share * jnp.sum(law_PMC * log_q_PMC, axis=-1)
        objective_PM += distance_share * jnp.sum(jnp.abs(jnp.exp(log_q_PMC) - law_PMC), axis=-1)
    weights_PM = slot_weights(weighting, ce_PM, valid_PM, train.gamma)
    loss = jnp.sum(weights_PM * objective_PM) / jnp.sum(weights_PM)
    right_PM = jnp.cumprod(valid_PM & (jnp.argmax(logits_PMC, axis=-1) == labels_PM), axis=1)
    metrics = {
        "loss": loss,
        "cross_entropy": jnp.sum(ce_PM * valid_PM) / jnp.sum(valid_PM),
        "accepted": jnp.sum(right_PM) / jnp.sum(drawn_BA),
    }
    return loss, metrics


@partial(jax.jit, static_argnames=("target", "config", "train"), donate_argnames="state")
def train_step(
    state: TrainState,
    target_params: Params,
    batch: Texts,
    target: ModelConfig,
    config: DrafterConfig,
    train: DraftTrainConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """One update. Anchors depend on (seed, step) only. The old state is donated."""
    key = jax.random.fold_in(jax.random.key(train.seed), state.step)
    gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params, key, target_params, batch, target, config, train)
    optimizer = make_optimizer(train.schedule, train.weight_decay, train.optimizer)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    metrics |= {"gradient_norm": optax.tree.norm(gradients), "rate": train.schedule(state.step)}
    return TrainState(params, optimizer_state, state.step + 1), metrics


def batch_of(texts: Texts, corpus: np.ndarray, step: int, train: DraftTrainConfig) -> Texts:
    """Batch `step` of endless walks over shuffled texts and corpus windows. Depends on (seed, step) only."""
    length, human = texts.tokens.shape[1], round(train.human_share * train.batch)
    rows = shuffled(len(texts), step, train.batch - human, train.seed)
    own = jax.tree.map(lambda array: array[rows], texts)
    if not human:
        return own
    windows = batch_at(corpus, step, human, length - 1, train.seed)
    written = Texts(windows, np.ones(human, np.int32), np.full(human, length, np.int32))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), own, written)


def training_update(
    texts: Texts, corpus: np.ndarray, model: Model, config: DrafterConfig, train: DraftTrainConfig
) -> Update[TrainState]:
    """The update of `run.train_until` for a drafter of `model`, whose weights are dense, on the model's mesh."""

    def update(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        batch = place_batch(batch_of(texts, corpus, step, train), model.mesh)
        return train_step(state, model.params, batch, model.config, config, train)

    return update


def latest_state(run: Path, config: DrafterConfig, train: DraftTrainConfig) -> TrainState:
    """The newest complete state of a run."""
    return restore(run, lambda: init_state(config, train))


def read_settings(run: Path) -> tuple[DrafterConfig, DraftTrainConfig]:
    """The configs a run was started with."""
    model, train = read_run(run)
    return DrafterConfig(**model), DraftTrainConfig(**train)


def extended(
    config: DrafterConfig, params: Params, bias_rank: int, lookup: int, seed: int
) -> tuple[DrafterConfig, Params]:
    """A finished drafter as a start: what it accepted is forgotten; a bias and guesses are added if it has none."""
    if bias_rank and config.bias_rank and bias_rank != config.bias_rank:
        raise UserError(f"drafter: bias_rank={bias_rank}, but the drafter to start from has {config.bias_rank}")
    added = {"bias_rank": bias_rank or config.bias_rank, "lookup": lookup or config.lookup}
    config = dataclasses.replace(config, acceptance_length=None, **added)
    return config, {**init_drafter(config, jax.random.key(seed)), **params}


def as_chain(config: DrafterConfig, params: Params) -> tuple[DrafterConfig, Params]:
    """A finished block drafter as a start for the autoregressive control, which has neither bias nor guesses."""
    bare = dataclasses.replace(config, acceptance_length=None, bias_rank=0, lookup=0)
    return bare, {name: params[name] for name in abstract_drafter(bare)}


def drafter_for(
    target: ModelConfig,
    tokenizer: Tokenizer,
    layers: int,
    window: int,
    bias_rank: int,
    lookup: int,
    taps: tuple[int, ...] | None = None,
) -> DrafterConfig:
    """A drafter in proportion to `target`; by default it taps five layers from the first to the last."""
    last = target.num_layers - 1
    return DrafterConfig(
        hidden_size=target.hidden_size,
        intermediate_size=4 * target.hidden_size,
        num_layers=layers,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.hidden_size // target.num_heads,
        target_layer_ids=taps or tuple(sorted({round(i * last / 4) for i in range(5)})),
        num_target_layers=target.num_layers,
        vocab_size=target.vocab_size,
        mask_token_id=tokenizer.id_of(MASK),
        window=window,
        value_scale=target.value_scale,
        bias_rank=bias_rank,
        lookup=lookup,
        norm_eps=target.norm_eps,
        max_position=target.max_position,
        dtype="float32",
        param_dtype="float32",
    )
