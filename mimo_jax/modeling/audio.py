"""From audio codes to rows for the text model: 25 frames a second of one code per channel, four frames to a row.

A frame's embeddings are added up; a small transformer without a mask reads the frames of a row, and nothing beyond
them; its outputs, side by side, are projected to the width of the text. Equations: SGLang's and vLLM's encoders.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.config.towers import AudioConfig
from mimo_jax.modeling.layers import RMSNorm, rotary_table
from mimo_jax.modeling.linear import parameter
from mimo_jax.modeling.towers import Affine, GatedMlp, gelu, look, rotated
from mimo_jax.weights import Params


class LocalAttention(nn.Module):
    """Heads over the frames of one row."""

    config: AudioConfig

    @nn.compact
    def __call__(self, x_GTD: Array) -> Array:
        config = self.config
        width, heads = config.hidden_size, config.num_heads
        q, k, v = (
            Affine(width, config.init_range, name=f"{name}_proj")(x_GTD).reshape(*x_GTD.shape[:2], heads, -1)
            for name in "qkv"
        )
        place_1T = jnp.arange(x_GTD.shape[1])[None]
        rotary = rotary_table(place_1T, width // heads, config.rope_theta, jnp.float32)
        q, k = rotated(q, rotary), rotated(k, rotary)
        out = look(q, k, v, jnp.int32(x_GTD.shape[1]))
        return Affine(width, config.init_range, has_bias=False, name="o_proj")(out.reshape(x_GTD.shape))


class LocalLayer(nn.Module):
    config: AudioConfig

    @nn.compact
    def __call__(self, x_GTD: Array) -> Array:
        config, eps = self.config, self.config.norm_eps
        x_GTD += LocalAttention(config, name="self_attn")(RMSNorm(eps, name="attention_norm")(x_GTD))
        mlp = GatedMlp(config.intermediate_size, config.init_range, has_bias=False, name="local_mlp")
        return x_GTD + mlp(RMSNorm(eps, name="mlp_norm")(x_GTD))


class AudioEncoder(nn.Module):
    """Rows for the text model, in the dtype `dtype`."""

    config: AudioConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, codes_GTN: Int[Array | np.ndarray, "G T N"]) -> Float[Array, "G O"]:
        """G rows of T frames with a code for each of N channels."""
        config = self.config
        shape = (config.channels, config.codes, config.hidden_size)
        table_NCD = parameter(self, "speech_embeddings", shape, nn.initializers.normal(config.init_range))
        embedded = table_NCD[jnp.arange(config.channels), codes_GTN].astype(jnp.float32)
        x_GTD = jnp.sum(embedded, axis=2).astype(self.dtype)
        for index in range(config.num_layers):
            x_GTD = LocalLayer(config, name=f"layers_{index}")(x_GTD)
        x_GTD = RMSNorm(config.norm_eps, name="local_norm")(x_GTD)
        inner = config.projection_ratio * config.group_size
        rows = Affine(inner, config.init_range, has_bias=False, name="projection_0")(x_GTD.reshape(len(x_GTD), -1))
        return Affine(config.out_size, config.init_range, has_bias=False, name="projection_2")(gelu(rows))


def grouped(codes_TN: Int[np.ndarray, "T N"], group: int) -> Int[np.ndarray, "G P N"]:
    """Frames by rows of `group`; the last one's are filled up by repeating the last frame."""
    missing = -len(codes_TN) % group
    padded = np.concatenate([codes_TN, np.repeat(codes_TN[-1:], missing, axis=0)])
    return padded.reshape(-1, group, codes_TN.shape[1])


def init_audio(config: AudioConfig, key: Array) -> Params:
    """Random parameters."""
    codes = jnp.zeros((1, config.group, config.channels), jnp.int32)
    return jax.jit(lambda key: AudioEncoder(config).init(key, codes)["params"])(key)
