"""The vision tower of MiMo-V2.5 and V2.6: patches of pixels become rows that stand in for tokens of the text.

A frame is a temporal patch of one image or video: attention stays within it, in every block. Its patches lie in the
order of preprocessing, the four of a token together; blocks of type `BY_COLUMNS` see their windows along the same
tokens, taken column by column. Equations: SGLang's and NeMo Automodel's towers, which agree.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.config.towers import BY_COLUMNS, FULL, VisionConfig
from mimo_jax.modeling.layers import RMSNorm, rotary_frequencies
from mimo_jax.modeling.linear import linear, matrix, parameter
from mimo_jax.modeling.towers import Affine, GatedMlp, LayerNorm, gelu, look, rotated
from mimo_jax.weights import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the S patches of a frame lie, some of them padding, at the end: the same in all frames of an input."""

    row: Int[Array | np.ndarray, "S"]
    column: Int[Array | np.ndarray, "S"]
    by_columns: Int[Array | np.ndarray, "S"]  # the patch that is k-th when tokens are taken column by column
    by_rows: Int[Array | np.ndarray, "S"]  # the way back
    count: Int[Array | np.ndarray, ""]  # of patches that are not padding


def places_of(rows: int, columns: int, size: int, merge: int) -> Places:
    """Of a frame of `rows` x `columns` patches, both multiples of `merge`, padded to `size` of them."""
    grid = np.arange(rows * columns).reshape(rows // merge, columns // merge, merge, merge)
    by_columns = np.arange(size)
    by_columns[: grid.size] = grid.swapaxes(0, 1).ravel()
    row, column = (np.zeros(size, np.int32) for _ in range(2))
    index = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
    row[: grid.size], column[: grid.size] = index.transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return Places(row, column, by_columns, np.argsort(by_columns), np.asarray(grid.size, np.int32))


class VisionAttention(nn.Module):
    """Heads with rotated rows and columns, over a whole frame or over a window of its sequence."""

    config: VisionConfig
    kind: int

    @nn.compact
    def __call__(self, x_FSD: Array, rotary: tuple[Array, Array], count: Array) -> Array:
        config = self.config
        heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
        rows = (heads + 2 * groups) * width
        qkv_FSR = Affine(rows, config.init_range, name="qkv")(x_FSD)
        split = (heads * width, (heads + groups) * width)
        q, k, v = (part.reshape(*x_FSD.shape[:2], -1, width) for part in jnp.split(qkv_FSR, split, axis=-1))
        q, k = rotated(q, rotary), rotated(k, rotary)
        sink_H = None
        if config.has_sink and self.kind != FULL:
            sink_H = parameter(self, "sinks", (heads,), nn.initializers.zeros).astype(jnp.float32)
        reach = None if self.kind == FULL else (config.window, config.window)
        out_FSHQ = look(q, k, v, count, reach, sink_H, config.sink)
        return Affine(config.hidden_size, config.init_range, name="proj")(out_FSHQ.reshape(*x_FSD.shape[:2], -1))


class VisionBlock(nn.Module):
    config: VisionConfig
    kind: int

    @nn.compact
    def __call__(self, x_FSD: Array, rotary: tuple[Array, Array], count: Array) -> Array:
        config, eps = self.config, self.config.norm_eps
        attention = VisionAttention(config, self.kind, name="attn")
        x_FSD += attention(RMSNorm(eps, name="norm1")(x_FSD), rotary, count)
        mlp = GatedMlp(config.intermediate_size, config.init_range, name="mlp")
        return x_FSD + mlp(RMSNorm(eps, name="norm2")(x_FSD))


class Merger(nn.Module):
    """The patches of a token side by side, through two layers, to the width of the text."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x_FSD: Float[Array, "F S D"]) -> Float[Array, "F M O"]:
        config = self.config
        x_FSD = LayerNorm(config.norm_eps, has_bias=False, name="ln_q")(x_FSD)
        merged = x_FSD.reshape(x_FSD.shape[0], -1, config.merged_size)
        inner = gelu(Affine(config.merged_size, config.init_range, has_bias=False, name="mlp_0")(merged))
        return Affine(config.out_size, config.init_range, has_bias=False, name="mlp_2")(inner)


class VisionTower(nn.Module):
    """Frames of patches become frames of rows for the text model, a `merge` x `merge`-th as many."""

    config: VisionConfig

    @nn.compact
    def __call__(self, patches_FSP: Float[Array, "F S P"], places: Places) -> Float[Array, "F M O"]:
        """P counts a patch's values: channel, frame, row, column. The dtype of `patches_FSP` is that of activations.

        Rows of padding mean nothing.
        """
        config = self.config
        shape = (config.hidden_size, config.channels, config.temporal_patch, config.patch, config.patch)
        embed = matrix(self, "patch_embed", shape, config.init_range)
        x_FSD = linear(patches_FSP, embed.reshape(shape[0], -1))
        rotary, is_by_columns = _rotary(config, places), False
        for index, kind in enumerate(config.windows):
            if (kind == BY_COLUMNS) != is_by_columns:
                order = places.by_rows if is_by_columns else places.by_columns
                x_FSD, rotary = jax.tree.map(partial(jnp.take, indices=order, axis=1), (x_FSD, rotary))
                is_by_columns = not is_by_columns
            x_FSD = VisionBlock(config, kind, name=f"blocks_{index}")(x_FSD, rotary, places.count)
        if is_by_columns:
            x_FSD = jnp.take(x_FSD, places.by_rows, axis=1)
        return Merger(config, name="merger")(x_FSD)


def _rotary(config: VisionConfig, places: Places) -> tuple[Array, Array]:
    """cos and sin [1, S, Q / 2]: the first half of the angles turns with the row, the second with the column."""
    frequencies = rotary_frequencies(config.head_dim // 2, config.rope_theta)
    angles = [jnp.asarray(place)[:, None] * frequencies for place in (places.row, places.column)]
    angles_1SR = jnp.concatenate(angles, axis=-1)[None]
    return jnp.cos(angles_1SR), jnp.sin(angles_1SR)


def init_vision(config: VisionConfig, key: Array) -> Params:
    """Random parameters."""
    size = config.merge**2
    patches = jnp.zeros((1, size, config.patch_values))
    places = places_of(config.merge, config.merge, size, config.merge)
    return jax.jit(lambda key: VisionTower(config).init(key, patches, places)["params"])(key)
