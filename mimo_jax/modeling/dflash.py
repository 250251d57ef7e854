"""The DFlash drafter (arXiv 2602.06036) in MiMo's form: one forward pass fills a block after the anchor token.

The target's auxiliary hidden states pass through one projection and norm, and are injected into every layer as keys
and values. The block's rows (the anchor's embedding, then one learned mask vector per draft) see that context through
a sliding window, and each other in both directions. Row k proposes the token at its own position.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mimo_jax.config.drafter import LONGEST_MATCH, DrafterConfig
from mimo_jax.modeling.attention import attend, heads_first
from mimo_jax.modeling.cache import LayerCache
from mimo_jax.modeling.layers import DenseMlp, RMSNorm, rotary_table, rotate
from mimo_jax.modeling.linear import Matrix, linear, matrix, parameter
from mimo_jax.weights import Params

KeysValues = tuple[Float[Array, "B T K Q"], Float[Array, "B T K Q"]]
Guesses = tuple[Float[Array, "B M D"], Int[Array, "B"]]  # embedded tokens, and how many tokens were matched


class DraftAttention(nn.Module):
    """Qwen3-style attention: per-head norms on queries and keys, half-width rotary, a sink logit per head."""

    config: DrafterConfig

    def setup(self) -> None:
        config = self.config
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = self._matrix("q", query, config.hidden_size)
        self.k = self._matrix("k", key, config.hidden_size)
        self.v = self._matrix("v", key, config.hidden_size)
        self.o = self._matrix("o", config.hidden_size, query)
        self.q_norm, self.k_norm = RMSNorm(config.norm_eps), RMSNorm(config.norm_eps)
        if config.has_sink:
            self.sink = parameter(self, "sink", (config.num_heads,), nn.initializers.zeros)

    def _matrix(self, name: str, rows: int, cols: int) -> Array | Matrix:
        return matrix(self, name, (rows, cols), self.config.init_range)

    def _heads(self, x: Array, weight: Array | Matrix) -> Array:
        return linear(x, weight).reshape(*x.shape[:2], -1, self.config.head_dim)

    def keys_values(self, x_BTD: Float[Array, "B T D"], rotary: tuple[Array, Array]) -> KeysValues:
        """What `x_BTD` offers to be attended to: rotated keys and scaled values."""
        keys = rotate(self.k_norm(self._heads(x_BTD, self.k)), *rotary)
        values = self._heads(x_BTD, self.v)
        return keys, (values.astype(jnp.float32) * self.config.value_scale).astype(values.dtype)

    def __call__(
        self, x_BND: Float[Array, "B N D"], rotary: tuple[Array, Array], context: LayerCache, visible_BNS: Array
    ) -> tuple[Float[Array, "B N D"], KeysValues]:
        """Attends to the context rows, then those of the block, that `visible_BNS` shows; also returns the block's."""
        q_BNHQ = rotate(self.q_norm(self._heads(x_BND, self.q)), *rotary)
        k_BNKQ, v_BNKQ = self.keys_values(x_BND, rotary)
        keys = jnp.concatenate([context.keys, heads_first(k_BNKQ)], axis=2)
        values = jnp.concatenate([context.values, heads_first(v_BNKQ)], axis=2)
        out = attend(q_BNHQ, keys, values, visible_BNS, self.sink if self.config.has_sink else None)
        return linear(out.reshape(*x_BND.shape[:2], -1), self.o), (k_BNKQ, v_BNKQ)


class DraftLayer(nn.Module):
    """Attention, then SwiGLU, each after a norm that the injected context does not pass."""

    config: DrafterConfig

    def setup(self) -> None:
        config = self.config
        self.input_norm, self.post_norm = RMSNorm(config.norm_eps), RMSNorm(config.norm_eps)
        self.attention = DraftAttention(config)
        self.mlp = DenseMlp(config.intermediate_size, config.init_range)

    def __call__(
        self, x_BND: Array, rotary: tuple[Array, Array], context: LayerCache, visible_BNS: Array
    ) -> tuple[Array, KeysValues]:
        y_BND, offered = self.attention(self.input_norm(x_BND), rotary, context, visible_BNS)
        x_BND = x_BND + y_BND
        return x_BND + self.mlp(self.post_norm(x_BND)), offered


class DFlash(nn.Module):
    """`context` makes auxiliary hidden states rows of the draft cache; the call itself fills one block per row."""

    config: DrafterConfig

    def setup(self) -> None:
        config = self.config
        width, init_range = config.hidden_size, config.init_range
        self.fuse = matrix(self, "fuse", (width, len(config.target_layer_ids) * width), init_range)
        self.context_norm, self.norm = RMSNorm(config.norm_eps), RMSNorm(config.norm_eps)
        self.mask = parameter(self, "mask", (width,), nn.initializers.normal(init_range))
        self.layers = [DraftLayer(config) for _ in range(config.num_layers)]
        if config.bias_rank:
            shape = (config.vocab_size, config.bias_rank)
            self.bias_in = matrix(self, "bias_in", shape, init_range)
            self.bias_out = parameter(self, "bias_out", shape, nn.initializers.zeros)
        if config.lookup:
            self.guess = parameter(self, "guess", (width, width), nn.initializers.zeros)
            self.matched = parameter(self, "matched", (LONGEST_MATCH + 1, width), nn.initializers.zeros)

    def context(self, aux_BTZ: Float[Array, "B T Z"], positions_BT: Int[Array, "B T"]) -> tuple[KeysValues, ...]:
        """Per draft layer the keys and values of tokens that the target has read."""
        config = self.config
        fused_BTD = self.context_norm(linear(aux_BTZ.astype(config.dtype), self.fuse))
        rotary = rotary_table(positions_BT, config.rotary_dim, config.context_theta, config.dtype)
        return tuple(layer.attention.keys_values(fused_BTD, rotary) for layer in self.layers)

    def __call__(
        self,
        anchor_BD: Float[Array, "B D"],
        starts_B: Int[Array, "B"],
        context: tuple[LayerCache, ...],
        positions_BS: Int[Array, "B S"],
        guesses: Guesses | None = None,
    ) -> Float[Array, "B N D"]:
        """Hidden rows of the block, ready for the target's head; row 0 is the anchor's.

        `anchor_BD` embeds the last decided token, at position `starts_B`; context rows at negative positions, or at
        `starts_B` and beyond, hold nothing. `guesses` are what prompt lookup predicts, if the config has it.
        """
        config = self.config
        shape = (anchor_BD.shape[0], config.block_size - 1, config.hidden_size)
        drafts_BMD = jnp.broadcast_to(self.mask.astype(config.dtype), shape)
        if guesses is not None:
            drafts_BMD += self._guessed(*guesses)
        x_BND = jnp.concatenate([anchor_BD.astype(config.dtype)[:, None], drafts_BMD], axis=1)
        return self.read(x_BND, starts_B, context, positions_BS)[0]

    def _guessed(self, guesses_BMD: Array, matched_B: Array) -> Float[Array, "B M D"]:
        """What a guess adds to the mask vector of its position; how long the match was says how far to trust it."""
        dtype = self.config.dtype
        found_B11 = (matched_B > 0)[:, None, None]
        guesses_BMD = jnp.where(found_B11, linear(guesses_BMD.astype(dtype), self.guess), 0)
        return guesses_BMD + self.matched[matched_B].astype(dtype)[:, None]

    def read(
        self,
        x_BND: Float[Array, "B N D"],
        starts_B: Int[Array, "B"],
        context: tuple[LayerCache, ...],
        positions_BS: Int[Array, "B S"],
        causal: bool = False,
    ) -> tuple[Float[Array, "B N D"], tuple[KeysValues, ...]]:
        """Hidden rows after embedded rows of any kind, and what each layer's rows offer as keys and values.

        A block's rows see each other in both directions, unless `causal`.
        """
        config = self.config
        batch, size = x_BND.shape[:2]
        rows_BN = starts_B[:, None] + jnp.arange(size)
        rotary = rotary_table(rows_BN, config.rotary_dim, config.block_theta, config.dtype)
        block_NN = jnp.tri(size, dtype=bool) if causal else jnp.ones((size, size), bool)
        visible_BNS = jnp.concatenate(
            [
                context_visibility(rows_BN, positions_BS, config.window),
                jnp.broadcast_to(block_NN, (batch, size, size)),
            ],
            axis=-1,
        )
        offered = []
        for layer, held in zip(self.layers, context):
            x_BND, keys_values = layer(x_BND.astype(config.dtype), rotary, held, visible_BNS)
            offered.append(keys_values)
        return self.norm(x_BND), tuple(offered)

    def bias(self, previous: Int[Array, "*B"]) -> Float[Array, "*B C"]:
        """What the token before a draft adds to that draft's logits: W2 W1[previous] (DSpark)."""
        return linear(self.bias_in[previous].astype(self.config.dtype), self.bias_out, jnp.float32)

    def everything(self, aux_BTZ: Array):
        """Touches every parameter; what `init` runs."""
        positions = jnp.broadcast_to(jnp.arange(aux_BTZ.shape[1]), aux_BTZ.shape[:2])
        context = tuple(LayerCache(*map(heads_first, layer)) for layer in self.context(aux_BTZ, positions))
        starts = jnp.full(aux_BTZ.shape[0], aux_BTZ.shape[1])
        anchor_BD = aux_BTZ[:, 0, : self.config.hidden_size]
        guesses = (anchor_BD[:, None], starts) if self.config.lookup else None
        hidden = self(anchor_BD, starts, context, positions, guesses)
        return hidden, self.bias(starts) if self.config.bias_rank else None


def context_visibility(
    rows_BN: Int[Array, "B N"], positions_BS: Int[Array, "B S"], window: int
) -> Bool[Array, "B N S"]:
    """Which context positions a block row sees: decided ones, before the anchor, less than `window` after the row."""
    positions = positions_BS[:, None, :]
    is_context = (positions >= 0) & (positions < rows_BN[:, :1, None])
    return is_context & (positions > rows_BN[:, :, None] - window)


def init_drafter(config: DrafterConfig, key: Array) -> Params:
    """Random parameters."""
    aux = jnp.zeros((1, 2, len(config.target_layer_ids) * config.hidden_size), config.dtype)
    return jax.jit(lambda key: DFlash(config).init(key, aux, method="everything")["params"])(key)


def abstract_drafter(config: DrafterConfig) -> Params:
    """The parameter tree as shapes and dtypes."""
    return jax.eval_shape(lambda: init_drafter(config, jax.random.key(0)))
