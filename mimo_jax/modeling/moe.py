"""The mixture-of-experts layer: a sigmoid router whose bias only selects, and the routed experts."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.config import ModelConfig
from mimo_jax.modeling.experts import routed_ffn
from mimo_jax.modeling.layers import weight_init
from mimo_jax.quantization import quantize_mx
from mimo_jax.sharding import gathered
from pallas_kernels.expert_matmul import PackedExperts, TiledExperts, tile_experts


def route(
    x_TD: Float[Array, "T D"], router_ED: Float[Array, "E D"], bias_E: Float[Array, "E"], chosen: int
) -> tuple[Int[Array, "T X"], Float[Array, "T X"]]:
    """The chosen experts and their combine weights, in full float32: a lower precision flips selections."""
    logits_TE = jnp.einsum(
        "td,ed->te", x_TD.astype(jnp.float32), router_ED.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    scores_TE = gathered(jax.nn.sigmoid(logits_TE))
    _, ids_TX = jax.lax.top_k(scores_TE + bias_E, chosen)
    picked_TX = jnp.take_along_axis(scores_TE, ids_TX, axis=-1)
    return ids_TX, picked_TX / (jnp.sum(picked_TX, axis=-1, keepdims=True) + 1e-20)


class MoE(nn.Module):
    """Returns the layer's output and how many tokens chose each expert; padding chooses none."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], counts_B: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T D"], Int[Array, "E"]]:
        config = self.config
        num_experts, hidden, features = config.num_experts, config.hidden_size, config.moe_intermediate_size
        router_ED = self.param("router", nn.initializers.normal(config.init_range), (num_experts, hidden), jnp.float32)
        bias_E = self.param("router_bias", nn.initializers.zeros, (num_experts,), jnp.float32)
        if config.expert_format == "tiled":
            experts = self.param("tiles", self._tiles)
        else:
            experts = (
                self._expert_weights("gate", features, hidden),
                self._expert_weights("up", features, hidden),
                self._expert_weights("down", hidden, features),
            )
        x_TD = x_BTD.reshape(-1, hidden)
        ids_TX, weights_TX = route(x_TD, router_ED, bias_E, config.experts_per_token)
        is_real_BT = jnp.arange(x_BTD.shape[1]) < counts_B[:, None]
        ids_TX = jnp.where(is_real_BT.reshape(-1, 1), ids_TX, num_experts)
        y_TD = routed_ffn(x_TD, ids_TX, weights_TX, experts, config.expert_backend)
        return y_TD.reshape(x_BTD.shape), jnp.bincount(ids_TX.reshape(-1), length=num_experts)

    def _expert_weights(self, name: str, rows: int, cols: int):
        config = self.config
        if config.expert_format != "unpacked":
            shape = (config.num_experts, rows, cols)
            return self.param(name, weight_init(config.expert_format, shape, config.init_range, config.param_dtype))
        one = weight_init("dense", (cols, rows), config.init_range, config.param_dtype)
        return self.param(name, lambda key: tuple(one(k) for k in jax.random.split(key, config.num_experts)))

    def _tiles(self, key: Array) -> TiledExperts:
        config = self.config
        wide = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
        shapes = (wide, wide, (wide[0], wide[2], wide[1]))
        draws = (jax.random.normal(one, shape) for one, shape in zip(jax.random.split(key, 3), shapes))
        stacks = (quantize_mx(config.init_range * draw) for draw in draws)
        return jax.jit(tile_experts)(PackedExperts(*((stack.codes, stack.scales) for stack in stacks)))  # traced once
