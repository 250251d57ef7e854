"""The MiMo-V2 text model as Flax modules: tokens and a cache in; logits, features and the cache out.

Pure functions over explicit state. `Backbone(config).apply({"params": params}, tokens, cache)` is all there is. Weights
are plain arrays, or what a layout made of them (`modeling.linear`).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.config.model import GLOBAL, SLIDING, ModelConfig
from mimo_jax.modeling.attention import Attention
from mimo_jax.modeling.cache import Cache, LayerCache
from mimo_jax.modeling.layers import DenseMlp, RMSNorm, rotary_table
from mimo_jax.modeling.linear import linear, matrix
from mimo_jax.modeling.moe import MoE
from mimo_jax.sharding import embedding_lookup
from mimo_jax.weights import Params

MEDIA = "media"  # parameter [R, D] of what is read with media: id `vocab_size` + r is row r of it, not a token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What the step shows besides logits: the final hidden states, per MoE layer the tokens of each expert, the
    auxiliary hidden states, side by side in the order they were asked for, and the first of the largest logits, which
    the modules leave to whoever needs them."""

    hidden: Float[Array, "B T D"]
    expert_counts: Int[Array, "L E"]
    aux: Float[Array, "B T Z"]
    best: Int[Array, "B _"] | None = None


class Block(nn.Module):
    """One pre-norm layer: attention of `kind`, then a dense or a routed FFN."""

    config: ModelConfig
    kind: int
    has_experts: bool

    def setup(self) -> None:
        self.input_norm = RMSNorm(self.config.norm_eps)
        self.attention = Attention(self.config, self.kind)
        self.post_norm = RMSNorm(self.config.norm_eps)
        if self.has_experts:
            self.moe = MoE(self.config)
        else:
            self.mlp = DenseMlp(self.config.intermediate_size, self.config.init_range)

    def __call__(self, x_BTD, rotary, cache, lengths_B, counts_B) -> tuple[Array, Array | None, LayerCache | None]:
        """The residual stream, tokens per expert (None for a dense layer), and the updated cache."""
        y_BTD, cache = self.attention(self.input_norm(x_BTD), rotary, cache, lengths_B, counts_B)
        x_BTD = x_BTD + y_BTD
        if not self.has_experts:
            return x_BTD + self.mlp(self.post_norm(x_BTD)), None, cache
        y_BTD, expert_counts_E = self.moe(self.post_norm(x_BTD), counts_B)
        return x_BTD + y_BTD, expert_counts_E, cache


class MtpLayer(nn.Module):
    """One multi-token-prediction layer: merges the next token's embedding with the hidden state before it."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.embed_norm, self.hidden_norm = RMSNorm(config.norm_eps), RMSNorm(config.norm_eps)
        shape = (config.hidden_size, 2 * config.hidden_size)
        self.eh_proj = matrix(self, "eh_proj", shape, config.init_range)
        self.input_norm, self.pre_mlp_norm, self.final_norm = (
            RMSNorm(config.norm_eps),
            RMSNorm(config.norm_eps),
            RMSNorm(config.norm_eps),
        )
        self.attention = Attention(config, SLIDING)
        self.mlp = DenseMlp(config.intermediate_size, config.init_range)

    def __call__(self, embedded_BTD, hidden_BTD, rotary, cache=None, lengths_B=None, counts_B=None):
        """`embedded_BTD` is the embedding of the token after each position of `hidden_BTD`."""
        merged = jnp.concatenate([self.embed_norm(embedded_BTD), self.hidden_norm(hidden_BTD)], axis=-1)
        x_BTD = linear(merged, self.eh_proj)
        y_BTD, cache = self.attention(self.input_norm(x_BTD), rotary, cache, lengths_B, counts_B)
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + self.mlp(self.pre_mlp_norm(x_BTD))
        return self.final_norm(x_BTD), cache


class Backbone(nn.Module):
    """Embedding, layers, final norm and head, plus the MTP layers that share the embedding and the head.

    `aux_layers` are the layers whose hidden states a drafter reads (the published config's `target_layer_ids`), each
    after its layer, before the final norm; -1 is the state before the first layer, the embedding.
    """

    config: ModelConfig
    aux_layers: tuple[int, ...] = ()

    def setup(self) -> None:
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = matrix(self, "embed", shape, config.init_range)
        self.layers = [Block(config, kind, bool(moe)) for kind, moe in zip(config.layer_pattern, config.moe_pattern)]
        self.norm = RMSNorm(config.norm_eps)
        self.head = matrix(self, "head", shape, config.init_range)
        self.mtp = [MtpLayer(config) for _ in range(config.mtp_layers)]

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        cache: Cache | None = None,
        counts_B: Int[Array, "B"] | None = None,
        logits: Literal["all", "last"] = "all",
    ) -> tuple[Float[Array, "B _ C"], Features, Cache | None]:
        """One forward pass over T tokens after the cache's (or over a whole sequence, without a cache).

        Only the first `counts_B` (default T) tokens of each row are real: the rest is padding, never cached. With
        logits="last" only the last real position's logits are computed, [B, 1, C]. Logits are float32.
        """
        batch, steps = tokens_BT.shape
        lengths_B = cache.lengths if cache else jnp.zeros(batch, jnp.int32)
        counts_B = jnp.full(batch, steps) if counts_B is None else counts_B
        rotary = self._rotary(lengths_B[:, None] + jnp.arange(steps))
        x_BTD = self._embedded(tokens_BT)
        layer_caches, expert_counts, hidden_states = [], [], {-1: x_BTD}
        for index, layer in enumerate(self.layers):
            held = cache.layers[index] if cache else None
            x_BTD, counts_E, held = layer(x_BTD, rotary[layer.kind], held, lengths_B, counts_B)
            layer_caches.append(held)
            hidden_states[index] = x_BTD
            if counts_E is not None:
                expert_counts.append(counts_E)
        x_BTD = self.norm(x_BTD)
        shown = x_BTD if logits == "all" else jnp.take_along_axis(x_BTD, (counts_B - 1)[:, None, None], axis=1)
        features = Features(
            hidden=x_BTD,
            expert_counts=jnp.stack(expert_counts) if expert_counts else jnp.zeros((0, 0), jnp.int32),
            aux=jnp.concatenate([x_BTD[..., :0], *(hidden_states[layer] for layer in self.aux_layers)], axis=-1),
        )
        updated = Cache(tuple(layer_caches), lengths_B + counts_B) if cache else None
        return linear(shown, self.head, jnp.float32), features, updated

    def predict_ahead(
        self, hidden_BTD: Float[Array, "B T D"], tokens_BT: Int[Array, "B T"]
    ) -> list[Float[Array, "B T C"]]:
        """Training-time MTP: logits of every depth d, for the token d + 2 places after each position.

        `hidden_BTD` is `Features.hidden` (after the final norm) of the same `tokens_BT`. Positions whose tokens lie
        beyond the sequence see a repeated last token; the loss leaves them out.
        """
        batch, steps = tokens_BT.shape
        rotary = self._rotary(jnp.broadcast_to(jnp.arange(steps), (batch, steps)))[SLIDING]
        logits = []
        for layer in self.mtp:
            tokens_BT = jnp.concatenate([tokens_BT[:, 1:], tokens_BT[:, -1:]], axis=1)
            hidden_BTD, _ = layer(self._embedded(tokens_BT), hidden_BTD, rotary)
            logits.append(linear(hidden_BTD, self.head, jnp.float32))
        return logits

    def mtp_step(
        self,
        hidden_BTD: Float[Array, "B T D"],
        tokens_BT: Int[Array, "B T"],
        cache: LayerCache,
        lengths_B: Int[Array, "B"],
        counts_B: Int[Array, "B"],
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The first MTP layer after its cache of `lengths_B` rows; `tokens_BT` are one place ahead of `hidden_BTD`.

        Returns hidden states for the head, which predict the token after each of `tokens_BT`, and the cache.
        """
        rotary = self._rotary(lengths_B[:, None] + jnp.arange(tokens_BT.shape[1]))[SLIDING]
        return self.mtp[0](self._embedded(tokens_BT), hidden_BTD, rotary, cache, lengths_B, counts_B)

    def everything(self, tokens_BT: Int[Array, "B T"]):
        """Touches every parameter; what `init` runs."""
        logits, features, _ = self(tokens_BT)
        return logits, self.predict_ahead(features.hidden, tokens_BT)

    def _embedded(self, tokens_BT: Array) -> Array:
        if not self.has_variable("params", MEDIA):
            return embedding_lookup(self.embed, tokens_BT).astype(self.config.dtype)
        row_BT = tokens_BT - self.config.vocab_size
        x_BTD = embedding_lookup(self.embed, jnp.minimum(tokens_BT, self.config.vocab_size - 1))
        media_BTD = self.get_variable("params", MEDIA)[jnp.maximum(row_BT, 0)]
        return jnp.where(row_BT[..., None] >= 0, media_BTD, x_BTD).astype(self.config.dtype)

    def _rotary(self, positions_BT: Array) -> dict[int, tuple[Array, Array]]:
        config = self.config
        return {
            kind: rotary_table(positions_BT, config.rotary_dim, config.theta(kind), config.dtype)
            for kind in (GLOBAL, SLIDING)
        }


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random parameters, plain float32 arrays, MTP layers included."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = jax.jit(lambda key: Backbone(config).init(key, tokens, method="everything")["params"])
    return init(key)  # jitted: op by op it takes minutes


def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree as shapes and dtypes: nothing is allocated, whatever the size."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
