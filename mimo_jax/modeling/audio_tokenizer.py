"""MiMo's audio tokenizer, its encoding half: a log-mel spectrogram becomes 25 frames of codes a second.

Two convolutions, 24 causal layers of which every other one sees a window only, a third convolution that halves the
rate, and residual vector quantisation. Equations: the published tokenizer as vLLM serves it. A segment is encoded by
itself: where the published code pads a batch of segments to the longest, a few codes depend on their neighbours.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.config.towers import AudioTokenizerConfig
from mimo_jax.modeling.layers import rotary_table
from mimo_jax.modeling.linear import matrix, parameter
from mimo_jax.modeling.towers import Affine, LayerNorm, gelu, look, rotated
from mimo_jax.weights import Params


class Convolution(nn.Module):
    """Along time, over `width` places; half of it, rounded down, is padding on each side where `is_padded`."""

    outputs: int
    width: int
    stride: int
    init_range: float
    is_padded: bool = True
    has_bias: bool = True

    @nn.compact
    def __call__(self, x_TD: Float[Array, "T D"]) -> Float[Array, "_ E"]:
        weight = matrix(self, "weight", (self.outputs, x_TD.shape[1], self.width), self.init_range)
        margin = self.width // 2 if self.is_padded else 0
        y_ET = jax.lax.conv_general_dilated(
            x_TD.T[None], jnp.asarray(weight).astype(x_TD.dtype), (self.stride,), [(margin, margin)]
        )
        y_TE = y_ET[0].T
        if self.has_bias:
            y_TE += parameter(self, "bias", (self.outputs,), nn.initializers.zeros).astype(y_TE.dtype)
        return y_TE


class TokenizerAttention(nn.Module):
    """Causal, over everything before or over a window; keys have no bias."""

    config: AudioTokenizerConfig
    has_window: bool

    @nn.compact
    def __call__(self, x_TD: Array, count: Array) -> Array:
        config, (steps, width) = self.config, x_TD.shape
        q, k, v = (
            Affine(width, config.init_range, has_bias=name != "k", name=f"{name}_proj")(x_TD).reshape(
                1, steps, config.num_heads, -1
            )
            for name in "qkv"
        )
        rotary = rotary_table(jnp.arange(steps)[None], width // config.num_heads, config.rope_theta, jnp.float32)
        q, k = rotated(q, rotary), rotated(k, rotary)
        out = look(q, k, v, count, (config.window if self.has_window else steps, 0))
        return Affine(width, config.init_range, name="out_proj")(out.reshape(x_TD.shape))


class TokenizerLayer(nn.Module):
    config: AudioTokenizerConfig
    has_window: bool

    @nn.compact
    def __call__(self, x_TD: Array, count: Array) -> Array:
        config, eps = self.config, self.config.norm_eps
        attention = TokenizerAttention(config, self.has_window, name="self_attn")
        x_TD += attention(LayerNorm(eps, name="self_attn_layer_norm")(x_TD), count)
        inner = Affine(config.intermediate_size, config.init_range, name="fc1")
        outer = Affine(config.hidden_size, config.init_range, name="fc2")
        return x_TD + outer(gelu(inner(LayerNorm(eps, name="final_layer_norm")(x_TD))))


class AudioTokenizer(nn.Module):
    """Codes of one segment."""

    config: AudioTokenizerConfig

    @nn.compact
    def __call__(self, mel_TM: Float[Array, "T M"], count: Int[Array, ""]) -> Int[Array, "_ N"]:
        """`count` of the rows of `mel_TM` are not padding; of the codes, those of `code_count` are valid."""
        state_TD = self._encode(mel_TM, count).astype(jnp.float32)
        codes = []
        for index, size in enumerate(self.config.codebooks):
            book = parameter(
                self, f"codebook_{index}", (size, self.config.hidden_size), nn.initializers.normal(1.0)
            ).astype(jnp.float32)
            # The nearest entry: of |r - e|^2 = |r|^2 - 2 r e + |e|^2 the first term is the same for all.
            products = jnp.einsum("td,cd->tc", state_TD, book, precision=jax.lax.Precision.HIGHEST)
            code_T = jnp.argmin(jnp.sum(book * book, axis=-1) - 2 * products, axis=-1)
            state_TD -= book[code_T]
            codes.append(code_T)
        return jnp.stack(codes, axis=1).astype(jnp.int32)

    def _encode(self, mel_TM: Array, count: Array) -> Float[Array, "_ D"]:
        config = self.config
        width, init_range = config.hidden_size, config.init_range
        x_TD = gelu(Convolution(width, 3, 1, init_range, name="conv1")(_cut(mel_TM, count)))
        x_TD = gelu(Convolution(width, 3, 2, init_range, name="conv2")(_cut(x_TD, count)))
        count = (count - 1) // 2 + 1
        skipped = x_TD
        for index in range(config.num_layers):
            x_TD = TokenizerLayer(config, config.has_window(index), name=f"layers_{index}")(x_TD, count)
            if index + 1 == config.skip_layer:
                skipped = x_TD
        x_TD = LayerNorm(config.norm_eps, name="layer_norm")(x_TD + skipped)
        x_TD = _cut(jnp.pad(x_TD, ((0, x_TD.shape[0] % 2), (0, 0))), count)
        down = Convolution(width, 2, 2, init_range, is_padded=False, has_bias=False, name="down_sample_layer")
        return LayerNorm(config.norm_eps, name="down_sample_norm")(gelu(down(x_TD)))


MEL_PER_CODE = 4  # frames of the spectrogram to a frame of codes


def code_count(frames: int) -> int:
    """Frames of codes of a segment of so many mel frames: two halvings, each rounded up."""
    return -(-((frames - 1) // 2 + 1) // 2)


def _cut(x_TD: Array, count: Array) -> Array:
    """Zeros behind the first `count` rows, as if nothing followed them."""
    return jnp.where((jnp.arange(x_TD.shape[0]) < count)[:, None], x_TD, 0)


def init_audio_tokenizer(config: AudioTokenizerConfig, key: Array) -> Params:
    """Random parameters."""
    mel = jnp.zeros((4, config.mels))
    return jax.jit(lambda key: AudioTokenizer(config).init(key, mel, jnp.int32(4))["params"])(key)
