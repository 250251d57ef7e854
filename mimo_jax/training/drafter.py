"""Training of the DFlash drafter on text of its target: random anchors, one block after each, one step of denoising.

A block after anchor position a learns the tokens at a + 1 ... a + 7 from the context strictly before a, through the
same code that drafts at inference. The target's features are computed on the fly and get no gradient.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from mimo_jax.config.drafter import LONGEST_MATCH, DrafterConfig
from mimo_jax.config.model import ModelConfig
from mimo_jax.drafters.prompt_lookup import continuation
from mimo_jax.errors import UserError, check_real, check_whole
from mimo_jax.loading import Model
from mimo_jax.modeling.attention import heads_first
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.cache import LayerCache
from mimo_jax.modeling.dflash import DFlash, KeysValues, abstract_drafter, init_drafter
from mimo_jax.modeling.linear import linear
from mimo_jax.sharding import place_batch
from mimo_jax.tokenizer import MASK, Tokenizer
from mimo_jax.training.corpus import batch_at, check_vocabulary, shuffled
from mimo_jax.training.optimizers import OPTIMIZERS, check_rate, make_optimizer
from mimo_jax.training.pretraining import TrainState, cross_entropy
from mimo_jax.training.run import Metrics, Update, configs_of, restore
from mimo_jax.training.self_distillation import Texts
from mimo_jax.weights import Params

# loss -> (share of cross-entropy with the text, with the target's distribution, of the L1 distance to that; weights of
# the positions)
LOSSES = {
    "soft": (0.0, 1.0, 0.0, "decay"),  # distillation, arXiv 1503.02531
    "soft-dpace": (0.0, 1.0, 0.0, "dpace"),
    "decay": (1.0, 0.0, 0.0, "decay"),  # DFlash, arXiv 2602.06036
    "dpace": (1.0, 0.0, 0.0, "dpace"),  # D-PACE, arXiv 2605.18810
    "tv": (0.1, 0.0, 0.9, "decay"),  # DSpark, arXiv 2607.05147
}
KINDS = ("block", "chain")
DPACE_FLOOR = 0.5  # alpha of D-PACE
MOST_LAYERS = 100


@dataclasses.dataclass(frozen=True)
class DraftTrainConfig:
    """One run of `steps` updates: `batch` sequences per step, `anchors` blocks in each."""

    steps: int
    batch: int = 16
    anchors: int = 24
    kind: str = "block"  # or "chain": the autoregressive control, see `drafters.autoregressive`
    loss: str = "soft"
    gamma: float = 4.0  # of the decay exp(-(k - 1) / gamma); 4 is the paper's for blocks of 8
    optimizer: str = "muon"
    peak_rate: float = 5e-3
    warmup_share: float = 0.04
    weight_decay: float = 0.1
    human_share: float = 0.0  # of the sequences, taken from the corpus instead of the target's own text
    bare_share: float = 0.0  # of the blocks, drafted without bias and guesses: what other engines read of a drafter
    seed: int = 0

    def __post_init__(self) -> None:
        for field, choices in (("kind", KINDS), ("loss", LOSSES), ("optimizer", OPTIMIZERS)):
            if getattr(self, field) not in choices:
                raise UserError(f"drafter: {field}={getattr(self, field)!r} must be one of {', '.join(choices)}")
        check_whole("drafter", 1, steps=self.steps, batch=self.batch, anchors=self.anchors)
        check_whole("drafter", 0, 2**32 - 1, seed=self.seed)
        check_rate("drafter", self.peak_rate)
        check_real("drafter", 0.01, 1e6, gamma=self.gamma)
        shares = {field: getattr(self, field) for field in ("human_share", "bare_share", "warmup_share")}
        check_real("drafter", 0, 1, weight_decay=self.weight_decay, **shares)

    @property
    def schedule(self) -> optax.Schedule:
        warmup = max(1, int(self.warmup_share * self.steps))
        return optax.warmup_cosine_decay_schedule(0.0, self.peak_rate, warmup, max(self.steps, warmup + 1))


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is chosen of a new drafter; the rest is in proportion to its target. See `DrafterConfig`."""

    layers: int = 2
    window: int = 128
    bias_rank: int = 0
    lookup: int = 0
    target_layer_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_whole("drafter", 1, MOST_LAYERS, layers=self.layers)
        check_whole("drafter", 1, window=self.window)
        check_whole("drafter", 0, bias_rank=self.bias_rank, lookup=self.lookup)

    def check_fits(self, target: ModelConfig) -> None:
        """Raises where a size goes beyond the target's, so that it would buy nothing but memory."""
        check_whole("drafter", 1, target.max_position, window=self.window)
        check_whole("drafter", 0, target.max_position, lookup=self.lookup)
        check_whole("drafter", 0, target.vocab_size, bias_rank=self.bias_rank)


def init_state(config: DrafterConfig, train: DraftTrainConfig, params: Params | None = None) -> TrainState:
    """The state before the first update: random parameters unless float32 `params` are given."""
    params = init_drafter(config, jax.random.key(train.seed)) if params is None else params
    return TrainState.begin(params, make_optimizer(train.schedule, train.weight_decay, train.optimizer))


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
    aux_BTZ: Float[Array, "B T Z"],
    tokens_BT: Int[Array, "B T"],
    anchors_BA: Int[Array, "B A"],
) -> Float[Array, "Y M D"]:
    """Hidden rows that predict the tokens after every anchor; Y runs over rows, then anchors.

    Each block gets a copy of the context window before it, so that no mask over all blocks and keys is ever built.
    """
    apply = partial(DFlash(config).apply, {"params": params})
    blocks, drafts = anchors_BA.size, config.block_size - 1
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    layers = apply(aux_BTZ, positions_BT, method="context")
    before_BAW = anchors_BA[..., None] + jnp.arange(-config.window, 0)  # negative: nothing there, never visible
    windows = tuple(_gather_windows(layer, before_BAW) for layer in layers)
    before_YW, starts_Y = before_BAW.reshape(blocks, -1), anchors_BA.reshape(-1)
    if kind == "chain":
        places_BAM = jnp.minimum(anchors_BA[..., None] + jnp.arange(drafts), tokens_BT.shape[1] - 1)
        x_YMD = embed_CD[_at(tokens_BT, places_BAM)].reshape(blocks, drafts, -1)
        return apply(x_YMD, starts_Y, windows, before_YW, causal=True, method="read")[0]
    anchor_YD = embed_CD[_at(tokens_BT, anchors_BA)].reshape(blocks, -1)
    guesses = None
    if config.lookup:
        look_up = partial(continuation, longest=LONGEST_MATCH, count=drafts)
        tokens_BAM, matched_BA = jax.vmap(jax.vmap(look_up, in_axes=(None, 0)))(tokens_BT, anchors_BA)
        guesses = embed_CD[tokens_BAM].reshape(blocks, drafts, -1), matched_BA.reshape(-1)
    return apply(anchor_YD, starts_Y, windows, before_YW, guesses)[:, 1:]


def draft_logits(
    params: Params,
    config: DrafterConfig,
    kind: str,
    target_params: Params,
    aux_BTZ: Float[Array, "B T Z"],
    tokens_BT: Int[Array, "B T"],
    anchors_BA: Int[Array, "B A"],
) -> Float[Array, "B A M C"]:
    """Logits of the tokens after every anchor, each told by the bias which token of the text it follows."""
    hidden_YMD = draft_hidden(params, config, kind, target_params["embed"], aux_BTZ, tokens_BT, anchors_BA)
    logits_YMC = linear(hidden_YMD, target_params["head"], jnp.float32)[..., : config.vocab_size]
    if config.bias_rank:
        places_BAM = anchors_BA[..., None] + jnp.arange(config.block_size - 1)
        previous_BAM = _at(tokens_BT, jnp.minimum(places_BAM, tokens_BT.shape[1] - 1))
        previous_YM = previous_BAM.reshape(-1, config.block_size - 1)
        logits_YMC += DFlash(config).apply({"params": params}, previous_YM, method="bias")
    return logits_YMC.reshape(*anchors_BA.shape, *logits_YMC.shape[1:])


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


def position_weights(
    kind: str, loss_YM: Float[Array, "Y M"], valid_YM: Bool[Array, "Y M"], gamma: float
) -> Float[Array, "Y M"]:
    """How much each draft position counts. Without a gradient.

    "decay": exp(-(k - 1) / gamma). "dpace": sum over m >= k of prod over i <= m of ((1 - a) q_i + a), q = exp(-loss):
    the share of the expected accepted length that hangs on position k.
    """
    if kind == "decay":
        return valid_YM * jnp.exp(-jnp.arange(loss_YM.shape[1]) / gamma)
    smoothed_YM = (1 - DPACE_FLOOR) * jnp.exp(-jax.lax.stop_gradient(loss_YM)) + DPACE_FLOOR
    reach_YM = jnp.cumprod(smoothed_YM, axis=1) * valid_YM
    return valid_YM * jnp.cumsum(reach_YM[:, ::-1], axis=1)[:, ::-1]


def loss_fn(
    params: Params,
    key: Array,
    target_params: Params,
    batch: Texts,
    target: ModelConfig,
    config: DrafterConfig,
    train: DraftTrainConfig,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The objective over all valid positions, and metrics; `accepted` is the drafts per block that equal the text."""
    tokens_BT = jnp.asarray(batch.tokens, jnp.int32)
    starts_B, ends_B = jnp.asarray(batch.starts), jnp.asarray(batch.ends)
    backbone = Backbone(target, config.target_layer_ids)
    target_BTC, features, _ = jax.lax.stop_gradient(backbone.apply({"params": target_params}, tokens_BT))
    anchors_BA, drawn_BA = draw_anchors(key, starts_B, ends_B, tokens_BT.shape[1], train.anchors)
    bare = round(train.bare_share * train.anchors)
    drafted = [
        draft_logits(params, each, train.kind, target_params, features.aux, tokens_BT, some_BA)
        for each, some_BA in ((config.published, anchors_BA[:, :bare]), (config, anchors_BA[:, bare:]))
        if some_BA.size
    ]
    logits_YMC = jnp.concatenate(drafted, axis=1).reshape(-1, *drafted[0].shape[2:])

    places_BAM = anchors_BA[..., None] + jnp.arange(1, config.block_size)
    valid_YM = ((places_BAM < ends_B[:, None, None]) & drawn_BA[..., None]).reshape(-1, config.block_size - 1)
    places_BAM = jnp.minimum(places_BAM, tokens_BT.shape[1] - 1)
    labels_YM = _at(tokens_BT, places_BAM).reshape(valid_YM.shape)

    text_share, target_share, distance_share, weighting = LOSSES[train.loss]
    ce_YM = cross_entropy(logits_YMC, labels_YM)
    objective_YM = text_share * ce_YM
    if target_share or distance_share:
        p_YMC = jax.nn.softmax(_at(target_BTC, places_BAM - 1), axis=-1).reshape(logits_YMC.shape)
        log_q_YMC = jax.nn.log_softmax(logits_YMC, axis=-1)
        objective_YM -= target_share * jnp.sum(p_YMC * log_q_YMC, axis=-1)
        objective_YM += distance_share * jnp.sum(jnp.abs(jnp.exp(log_q_YMC) - p_YMC), axis=-1)
    weights_YM = position_weights(weighting, ce_YM, valid_YM, train.gamma)
    loss = jnp.sum(weights_YM * objective_YM) / jnp.sum(weights_YM)
    right_YM = jnp.cumprod(valid_YM & (jnp.argmax(logits_YMC, axis=-1) == labels_YM), axis=1)
    metrics = {
        "loss": loss,
        "cross_entropy": jnp.sum(ce_YM * valid_YM) / jnp.sum(valid_YM),
        "accepted": jnp.sum(right_YM) / jnp.sum(drawn_BA),
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
    metrics |= {"gradient_norm": optax.tree.norm(gradients), "rate": train.schedule(state.step)}
    return state.after(gradients, make_optimizer(train.schedule, train.weight_decay, train.optimizer)), metrics


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
    length, vocab_size = texts.tokens.shape[1], model.config.vocab_size
    if train.anchors > length:
        raise UserError(f"drafter: anchors={train.anchors} do not fit into texts of {length} tokens")
    check_vocabulary(np.asarray(texts.tokens), vocab_size)
    batch_of(texts, corpus, 0, train)  # raises where the corpus is too small
    params = jax.device_put(model.params)  # once, not with every step

    def update(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        batch = place_batch(batch_of(texts, corpus, step, train), model.mesh)
        return train_step(state, params, batch, model.config, config, train)

    return update


def latest_state(run: Path, config: DrafterConfig, train: DraftTrainConfig) -> TrainState:
    """The newest complete state of a run."""
    return restore(run, lambda: init_state(config, train))


def read_settings(run: Path) -> tuple[DrafterConfig, DraftTrainConfig]:
    """The configs a run was started with."""
    return configs_of(run, DrafterConfig, DraftTrainConfig)


def extended(config: DrafterConfig, params: Params, geometry: Geometry, seed: int) -> tuple[DrafterConfig, Params]:
    """A finished drafter as a start: what it accepted is forgotten; a bias and guesses are added if it has none."""
    bias_rank = geometry.bias_rank
    if bias_rank and config.bias_rank and bias_rank != config.bias_rank:
        raise UserError(f"drafter: bias_rank={bias_rank}, but the drafter to start from has {config.bias_rank}")
    added = {"bias_rank": bias_rank or config.bias_rank, "lookup": geometry.lookup or config.lookup}
    config = dataclasses.replace(config, acceptance_length=None, published_acceptance_length=None, **added)
    return config, {**init_drafter(config, jax.random.key(seed)), **params}


def as_chain(config: DrafterConfig, params: Params) -> tuple[DrafterConfig, Params]:
    """A finished block drafter as a start for the autoregressive control, which has neither bias nor guesses."""
    bare = dataclasses.replace(config.published, acceptance_length=None)
    return bare, {name: params[name] for name in abstract_drafter(bare)}


def drafter_for(target: ModelConfig, tokenizer: Tokenizer, geometry: Geometry) -> DrafterConfig:
    """A drafter in proportion to `target`; by default it reads five layers from the first to the last."""
    geometry.check_fits(target)
    last = target.num_layers - 1
    return DrafterConfig(
        hidden_size=target.hidden_size,
        intermediate_size=4 * target.hidden_size,
        num_layers=geometry.layers,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.hidden_size // target.num_heads,
        target_layer_ids=geometry.target_layer_ids or tuple(sorted({round(i * last / 4) for i in range(5)})),
        num_target_layers=target.num_layers,
        vocab_size=target.vocab_size,
        mask_token_id=tokenizer.id_of(MASK),
        window=geometry.window,
        value_scale=target.value_scale,
        bias_rank=geometry.bias_rank,
        lookup=geometry.lookup,
        norm_eps=target.norm_eps,
        max_position=target.max_position,
        dtype="float32",
    )
