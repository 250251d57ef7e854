"""The one table between the parameter tree and the published tensor names; reader, writer and tests all derive from it.

A row says: where the weight sits in the tree, what Hugging Face calls it, how it is stored, and its axes. Axis letters
are those of `mimo_jax/glossary.md`; M is the rows of one QKV chunk and G the number of chunks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from mimo_jax.config import GLOBAL, SLIDING, ModelConfig
from mimo_jax.quantization.fp8 import grid_shape
from pallas_kernels import mxfp4


@dataclasses.dataclass(frozen=True)
class Row:
    """`group` decides the format: "plain" (the dense dtype), "router" (F32), "linear" and "expert" (the storage's)."""

    path: str
    name: str
    group: str
    axes: str


_TOP = (
    Row("embed", "model.embed_tokens.weight", "plain", "C D"),
    Row("head", "lm_head.weight", "plain", "C D"),
    Row("norm/weight", "model.norm.weight", "plain", "D"),
)
_BLOCK = (
    Row("input_norm/weight", "input_layernorm.weight", "plain", "D"),
    Row("post_norm/weight", "post_attention_layernorm.weight", "plain", "D"),
)
_FUSED = (Row("attention/qkv", "self_attn.qkv_proj", "linear", "G M D"),)
_SPLIT = (
    Row("attention/q", "self_attn.q_proj", "linear", "HQ D"),
    Row("attention/k", "self_attn.k_proj", "linear", "KQ D"),
    Row("attention/v", "self_attn.v_proj", "linear", "KV D"),
)
_OUTPUT = (Row("attention/o", "self_attn.o_proj.weight", "plain", "D HV"),)
_SINK = (Row("attention/sink", "self_attn.attention_sink_bias", "plain", "H"),)
_MLP = (
    Row("mlp/gate", "mlp.gate_proj", "linear", "F D"),
    Row("mlp/up", "mlp.up_proj", "linear", "F D"),
    Row("mlp/down", "mlp.down_proj", "linear", "D F"),
)
_MOE = (
    Row("moe/router", "mlp.gate.weight", "router", "E D"),
    Row("moe/router_bias", "mlp.gate.e_score_correction_bias", "router", "E"),
    Row("moe/gate", "mlp.experts.{expert}.gate_proj", "expert", "E f D"),
    Row("moe/up", "mlp.experts.{expert}.up_proj", "expert", "E f D"),
    Row("moe/down", "mlp.experts.{expert}.down_proj", "expert", "E D f"),
)
_MTP = (
    Row("embed_norm/weight", "enorm.weight", "plain", "D"),
    Row("hidden_norm/weight", "hnorm.weight", "plain", "D"),
    Row("input_norm/weight", "input_layernorm.weight", "plain", "D"),
    Row("pre_mlp_norm/weight", "pre_mlp_layernorm.weight", "plain", "D"),
    Row("final_norm/weight", "final_layernorm.weight", "plain", "D"),
    Row("eh_proj", "eh_proj.weight", "plain", "D 2D"),
)

# Tensors of the omnimodal files that a text model does not have; the reader leaves them out and says so.
SKIPPED_PREFIXES = ("visual.", "audio_encoder.", "speech_embeddings.")
MTP_PREFIX = "model.mtp."
HF_DTYPES = {"bfloat16": "BF16", "float32": "F32"}

# Format -> parts of one weight: (field of the tree's tensor, suffix of the name, dtype; None is the dense dtype).
_PARTS: dict[str, tuple[tuple[str | None, str, str | None], ...]] = {
    "plain": ((None, "", None),),
    "router": ((None, "", "F32"),),
    "dense": ((None, ".weight", None),),
    "fp8": (("codes", ".weight", "F8_E4M3"), ("scales", ".weight_scale_inv", "F32")),
    "mxfp4": (("codes", ".weight", "U8"), ("scales", ".weight_scale", "U8")),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of the tree (`field` of the weight at `path`, or the weight itself) and the tensors that fill it."""

    field: str | None
    name: str  # for a stack of experts, with {expert} in it
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]  # in the tree
    layout: str  # "whole"; "stack": one tensor per leading index; "chunks": leading axes merged into rows

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of one of its tensors."""
        if self.layout == "stack":
            return self.shape[1:]
        return (self.shape[0] * self.shape[1], *self.shape[2:]) if self.layout == "chunks" else self.shape

    def tensor_name(self, index: int = 0) -> str:
        return self.name.format(expert=index) if self.layout == "stack" else self.name

    @property
    def count(self) -> int:
        return self.shape[0] if self.layout == "stack" else 1


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of the parameter tree with its format, logical shape and parts."""

    path: tuple[str, ...]
    group: str
    format: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    kind: int  # of the layer it belongs to: GLOBAL or SLIDING

    @property
    def label(self) -> str:
        return "/".join(self.path)


def weights(config: ModelConfig) -> Iterator[Weight]:
    """Every weight of the model, lazily and in file order. A config that asks for billions costs nothing by itself."""
    yield from _expand(config, _TOP, GLOBAL, "", "")
    attention = (_FUSED if config.qkv_layout == "fused_qkv" else _SPLIT) + _OUTPUT
    for index, (kind, moe) in enumerate(zip(config.layer_pattern, config.moe_pattern)):
        rows = _BLOCK + attention + (_SINK if config.has_sink(kind) else ()) + (_MOE if moe else _MLP)
        yield from _expand(config, rows, kind, f"layers_{index}/", f"model.layers.{index}.")
    rows = _MTP + attention + (_SINK if config.has_sink(SLIDING) else ()) + _MLP
    for index in range(config.mtp_layers):
        yield from _expand(config, rows, SLIDING, f"mtp_{index}/", f"{MTP_PREFIX}layers.{index}.")


def qkv_rows(config: ModelConfig, kind: int) -> tuple[int, int, int]:
    """Rows of Q, K and V in a layer of `kind`."""
    kv_heads = config.kv_heads(kind)
    return config.num_heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.v_head_dim


def _axis_sizes(config: ModelConfig, kind: int) -> dict[str, int]:
    query, key, value = qkv_rows(config, kind)
    return {
        "C": config.vocab_size,
        "D": config.hidden_size,
        "2D": 2 * config.hidden_size,
        "E": config.num_experts,
        "F": config.intermediate_size,
        "f": config.moe_intermediate_size,
        "G": config.qkv_chunks,
        "H": config.num_heads,
        "HQ": query,
        "HV": config.num_heads * config.v_head_dim,
        "KQ": key,
        "KV": value,
        "M": (query + key + value) // config.qkv_chunks,
    }


def _expand(config: ModelConfig, rows: tuple[Row, ...], kind: int, path: str, name: str) -> Iterator[Weight]:
    formats = {"linear": config.linear_format, "expert": config.expert_format}
    sizes = _axis_sizes(config, kind)
    for row in rows:
        fmt = formats.get(row.group, row.group)
        shape = tuple(sizes[axis] for axis in row.axes.split())
        layout = {"E f D": "stack", "E D f": "stack", "G M D": "chunks"}.get(row.axes, "whole")
        parts = tuple(
            Part(field, name + row.name + suffix, dtype or HF_DTYPES[config.param_dtype], part_shape, layout)
            for (field, suffix, dtype), part_shape in zip(_PARTS[fmt], _part_shapes(fmt, shape))
        )
        yield Weight(tuple((path + row.path).split("/")), row.group, fmt, shape, parts, kind)


def _part_shapes(fmt: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    if fmt == "fp8":
        return shape, grid_shape(shape)
    if fmt == "mxfp4":
        return (*shape[:-1], shape[-1] // 2), (*shape[:-1], shape[-1] // mxfp4.BLOCK)
    return (shape,)


def split_names(name: str) -> tuple[str, str, str]:
    """The names a split export gives the three thirds of the fused projection `name`."""
    query, key, value = (name.replace("qkv_proj", f"{letter}_proj") for letter in "qkv")
    return query, key, value


def tensors_of(weight: Weight) -> Iterator[tuple[Part, int, str]]:
    """(part, index in a stack, name) of each of the weight's tensors; the parts of one expert lie together."""
    for index in range(weight.parts[0].count):
        for part in weight.parts:
            yield part, index, part.tensor_name(index)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of a checkpoint of `config` in the published layout."""
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for weight in weights(config):
        for part, _, name in tensors_of(weight):
            if name in table:
                raise ValueError(f"the name table gives {name} twice")
            table[name] = (part.dtype, part.tensor_shape)
    return table


def array_bytes(config: ModelConfig) -> int:
    """Bytes of all arrays of the tree."""
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
    return sum(math.prod(part.shape) * sizes[part.dtype] for weight in weights(config) for part in weight.parts)
