"""The mixture-of-experts layer: a sigmoid router whose bias only selects, and the routed experts."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.config.model import ModelConfig
from mimo_jax.modeling.experts import DenseExperts, Experts, routed_ffn
from mimo_jax.modeling.linear import matrix, parameter
from mimo_jax.sharding import replicate


def route(
    x_TD: Float[Array, "T D"], router_ED: Float[Array, "E D"], bias_E: Float[Array, "E"], chosen: int
) -> tuple[Int[Array, "T X"], Float[Array, "T X"]]:
    """The chosen experts and their combine weights, in full float32: a lower precision flips selections."""
    logits_TE = jnp.einsum(
        "td,ed->te", x_TD.astype(jnp.float32), router_ED.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    scores_TE = replicate(jax.nn.sigmoid(logits_TE))
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
        init = nn.initializers.normal(config.init_range)
        router_ED = parameter(self, "router", (config.num_experts, config.hidden_size), init)
        bias_E = parameter(self, "router_bias", (config.num_experts,), nn.initializers.zeros)
        x_TD = x_BTD.reshape(-1, config.hidden_size)
        ids_TX, weights_TX = route(x_TD, router_ED, bias_E, config.experts_per_token)
        is_real_BT = jnp.arange(x_BTD.shape[1]) < counts_B[:, None]
        ids_TX = jnp.where(is_real_BT.reshape(-1, 1), ids_TX, config.num_experts)
        y_TD = routed_ffn(x_TD, ids_TX, weights_TX, self._experts())
        return y_TD.reshape(x_BTD.shape), jnp.bincount(ids_TX.reshape(-1), length=config.num_experts)

    def _experts(self) -> Experts:
        """What a layout put there, or the three plain stacks."""
        if (held := self.get_variable("params", "experts")) is not None:
            return held
        config = self.config
        wide = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
        return DenseExperts(
            matrix(self, "gate", wide, config.init_range),
            matrix(self, "up", wide, config.init_range),
            matrix(self, "down", (wide[0], wide[2], wide[1]), config.init_range),
        )
