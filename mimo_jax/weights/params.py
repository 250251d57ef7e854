"""THE table of parameters: everything else that is known of one is derived from its row.

A row says where a weight sits in the parameter tree, what published files call it, its axes, how its file stores it,
which optimiser trains it, and whether it is a matrix that a layout may repack. Abstract trees, shardings, byte counts,
the map of names, Orbax targets and optimiser masks come from here, for the target and for its drafter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from mimo_jax.config.drafter import LONGEST_MATCH, DrafterConfig
from mimo_jax.config.model import GLOBAL, SLIDING, FileFormat, ModelConfig
from mimo_jax.config.towers import AudioTokenizerConfig
from mimo_jax.weights.dtypes import DTYPES, HF_DTYPES
from mimo_jax.weights.fp8 import BlockFp8Tensor, grid_shape
from mimo_jax.weights.mxfp4 import MxTensor
from mimo_jax.weights.row import Row, expert, matrix, norm
from mimo_jax.weights.towers import TOWER_ROWS, Rows, rows_of_tokenizer, rows_of_towers
from pallas_kernels import mxfp4

_TOP = (
    Row("embed", "model.embed_tokens.weight", "vocab width"),
    matrix("head", "lm_head.weight", "vocab width", optimizer="adamw"),
    norm("norm", "model.norm"),
)
_LAYER_NORMS = (norm("input_norm", "input_layernorm"), norm("post_norm", "post_attention_layernorm"))
_FUSED = (matrix("attention/qkv", "self_attn.qkv_proj", "chunks chunk_rows width", "linear"),)
_SPLIT = (
    matrix("attention/q", "self_attn.q_proj", "query_rows width", "linear"),
    matrix("attention/k", "self_attn.k_proj", "key_rows width", "linear"),
    matrix("attention/v", "self_attn.v_proj", "value_rows width", "linear"),
)
_OUTPUT = (matrix("attention/o", "self_attn.o_proj.weight", "width head_outputs"),)
_SINK = (Row("attention/sink", "self_attn.attention_sink_bias", "heads"),)
_MLP = (
    matrix("mlp/gate", "mlp.gate_proj", "features width", "linear"),
    matrix("mlp/up", "mlp.up_proj", "features width", "linear"),
    matrix("mlp/down", "mlp.down_proj", "width features", "linear"),
)
_MOE = (
    Row("moe/router", "mlp.gate.weight", "router_rows width", "router"),
    Row("moe/router_bias", "mlp.gate.e_score_correction_bias", "all_experts", "float32"),
    expert("moe/gate", "mlp.experts.{index}.gate_proj", "experts expert_features width"),
    expert("moe/up", "mlp.experts.{index}.up_proj", "experts expert_features width"),
    expert("moe/down", "mlp.experts.{index}.down_proj", "experts width expert_features"),
)
_MTP = (
    norm("embed_norm", "enorm"),
    norm("hidden_norm", "hnorm"),
    norm("input_norm", "input_layernorm"),
    norm("pre_mlp_norm", "pre_mlp_layernorm"),
    norm("final_norm", "final_layernorm"),
    matrix("eh_proj", "eh_proj.weight", "width two_widths"),
)

# The drafter's, in its folder `dflash/`. The order-aware bias and the guesses are extras: published drafters lack them.
MASK = Row("mask", "", "width")  # a vector in a file of its own
_DRAFT_TOP = (
    matrix("fuse", "fc.weight", "width aux_widths"),
    norm("context_norm", "hidden_norm"),
    norm("norm", "norm"),
)
_DRAFT_BIAS = (
    Row("bias_in", "markov_in.weight", "looked_up_vocab rank"),
    Row("bias_out", "markov_out.weight", "vocab rank"),
)
_DRAFT_LOOKUP = (
    matrix("guess", "lookup_guess.weight", "width same_width"),
    Row("matched", "lookup_matched.weight", "match_lengths width"),
)
_DRAFT_LAYER = (
    norm("input_norm", "input_layernorm"),
    matrix("attention/q", "self_attn.q_proj.weight", "query_rows width"),
    matrix("attention/k", "self_attn.k_proj.weight", "key_rows width"),
    matrix("attention/v", "self_attn.v_proj.weight", "value_rows width"),
    matrix("attention/o", "self_attn.o_proj.weight", "width head_outputs"),
    norm("attention/q_norm", "self_attn.q_norm", "head"),
    norm("attention/k_norm", "self_attn.k_norm", "head"),
    norm("post_norm", "post_attention_layernorm"),
    matrix("mlp/gate", "mlp.gate_proj.weight", "features width"),
    matrix("mlp/up", "mlp.up_proj.weight", "features width"),
    matrix("mlp/down", "mlp.down_proj.weight", "width features"),
)
_TARGET = (*_TOP, *_LAYER_NORMS, *_FUSED, *_SPLIT, *_OUTPUT, *_SINK, *_MLP, *_MOE, *_MTP)
_DRAFTER = (MASK, *_DRAFT_TOP, *_DRAFT_BIAS, *_DRAFT_LOOKUP, *_DRAFT_LAYER, *_SINK)
# Where both have a path, they differ in what a file does alone.
ROWS = {row.path: row for row in (*_DRAFTER, *_TARGET, *TOWER_ROWS)}

MTP_PREFIX = "model.mtp."
PACKED_FIELDS = ("codes", "scales")
STACKS = ("gate", "up", "down")  # of a layer's experts

# Stored form -> parts of one weight: (field of the tree's tensor, suffix of the name, dtype; None is the format's).
_PARTS: dict[str, tuple[tuple[str | None, str, str | None], ...]] = {
    "plain": ((None, "", None),),
    "router": ((None, "", None),),
    "float32": ((None, "", "F32"),),
    "dense": ((None, ".weight", None),),
    "fp8": (("codes", ".weight", "F8_E4M3"), ("scales", ".weight_scale_inv", "F32")),
    "mxfp4": (("codes", ".weight", "U8"), ("scales", ".weight_scale", "U8")),
}
_CONTAINERS: dict[str, Callable[..., Any]] = {
    "fp8": BlockFp8Tensor,
    "mxfp4": MxTensor,
    **dict.fromkeys(("dense", "plain", "router", "float32"), lambda array: array),
}

ShardingOf = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of the tree (`field` of the weight at `path`, or the weight itself) and the tensors that fill it."""

    path: tuple[str, ...]
    field: str | None
    name: str  # for a stack, with {index} in it
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]  # in the tree
    split: str  # "whole"; "stack": one tensor per leading index; "chunks": leading axes merged into rows

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of one of its tensors."""
        if self.split == "stack":
            return self.shape[1:]
        return (self.shape[0] * self.shape[1], *self.shape[2:]) if self.split == "chunks" else self.shape

    def tensor_name(self, index: int = 0) -> str:
        return self.name.format(index=index) if self.split == "stack" else self.name

    @property
    def count(self) -> int:
        return self.shape[0] if self.split == "stack" else 1


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of the parameter tree: its row, how it is stored, its logical shape and its parts."""

    path: tuple[str, ...]
    row: Row
    stored: str  # of `_PARTS`
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    layer_kind: int  # of the layer it belongs to: GLOBAL or SLIDING

    @property
    def label(self) -> str:
        return "/".join(self.path)

    def wrap(self, arrays: Sequence[Any]) -> Any:
        """One array for each part, as the tree holds them."""
        return _CONTAINERS[self.stored](*arrays)

    def of(self, tree: dict[str, Any]) -> Any:
        """This weight's node of a parameter tree."""
        for key in self.path:
            tree = tree[key]
        return tree


def row_of(path: Sequence[str]) -> Row | None:
    """The row of a parameter, at a path that ends with the parameter's own (and the field of a packed tensor)."""
    names = path[:-1] if path[-1] in PACKED_FIELDS else path
    tails = ("/".join(names[start:]) for start in range(len(names)))
    return next((ROWS[tail] for tail in tails if tail in ROWS), None)


def path_names(path: Sequence[Any]) -> list[str]:
    """A path of `jax.tree_util` as names."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/").split("/")


def is_expert(path: Sequence[Any]) -> bool:
    """Whether a path of `jax.tree_util` leads to a stack of experts."""
    row = row_of(path_names(path))
    return row is not None and row.kind == "expert"


def is_matrix(path: Sequence[Any]) -> bool:
    """Whether a path of `jax.tree_util` leads to a matrix that `modeling.linear` multiplies by."""
    row = row_of(path_names(path))
    return row is not None and row.is_matrix


def is_moe(node: Any) -> bool:
    """Whether a node of a parameter tree holds a layer's router and experts."""
    return isinstance(node, dict) and "router" in node


def with_experts(node: dict[str, Any], experts: Any) -> dict[str, Any]:
    """A layer's router and experts, the three stacks replaced by a container."""
    return {name: leaf for name, leaf in node.items() if name not in STACKS} | {"experts": experts}


def weights(config: ModelConfig, file_format: FileFormat) -> Iterator[Weight]:
    """Every weight of the model, lazily and in file order. A config that asks for billions costs nothing by itself."""

    def expand(rows: tuple[Row, ...], layer_kind: int, path: str = "", name: str = "") -> Iterator[Weight]:
        sizes = _axis_sizes(config, layer_kind)
        return (_weight(row, sizes, file_format, path, name, layer_kind) for row in rows)

    yield from expand(_TOP, GLOBAL)
    attention = (_FUSED if config.fused_qkv else _SPLIT) + _OUTPUT
    for index, (kind, has_experts) in enumerate(zip(config.layer_pattern, config.moe_pattern)):
        rows = _LAYER_NORMS + attention + (_SINK if config.has_sink(kind) else ()) + (_MOE if has_experts else _MLP)
        yield from expand(rows, kind, f"layers_{index}/", f"model.layers.{index}.")
    yield from _expanded(rows_of_towers(config.vision, config.audio), file_format)  # those that predict ahead come last
    rows = _MTP + attention + (_SINK if config.has_sink(SLIDING) else ()) + _MLP
    for index in range(config.mtp_layers):
        yield from expand(rows, SLIDING, f"mtp_{index}/", f"{MTP_PREFIX}layers.{index}.")


def tokenizer_weights(config: AudioTokenizerConfig, dtype: str) -> Iterator[Weight]:
    """Every weight of an audio tokenizer whose files store `dtype`."""
    yield from _expanded(rows_of_tokenizer(config), FileFormat("dense", dtype))


def _expanded(groups: Iterator[Rows], file_format: FileFormat) -> Iterator[Weight]:
    for rows, sizes, path, name in groups:
        for row in rows:
            yield _weight(row, sizes, file_format, path, name, GLOBAL)


def drafter_weights(config: DrafterConfig, dtype: str) -> Iterator[Weight]:
    """Every weight of a drafter whose files store `dtype`, lazily; the mask vector first, which has no name."""
    sizes, plain = _drafter_sizes(config), FileFormat("dense", dtype)
    for row in (MASK, *_DRAFT_TOP):
        yield _weight(row, sizes, plain, "", "", SLIDING)
    yield from drafter_extras(config, dtype)
    for index in range(config.num_layers):
        for row in _DRAFT_LAYER + (_SINK if config.has_sink else ()):
            yield _weight(row, sizes, plain, f"layers_{index}/", f"layers.{index}.", SLIDING)


def drafter_extras(config: DrafterConfig, dtype: str) -> Iterator[Weight]:
    """Those of `drafter_weights` that published drafters lack."""
    sizes, plain = _drafter_sizes(config), FileFormat("dense", dtype)
    for row in (_DRAFT_BIAS if config.bias_rank else ()) + (_DRAFT_LOOKUP if config.lookup else ()):
        yield _weight(row, sizes, plain, "", "", SLIDING)


def qkv_rows(config: ModelConfig, kind: int) -> tuple[int, int, int]:
    """Rows of Q, K and V in a layer of `kind`."""
    kv_heads = config.kv_heads(kind)
    return config.num_heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.v_head_dim


def _axis_sizes(config: ModelConfig, kind: int) -> dict[str, int]:
    query, key, value = qkv_rows(config, kind)
    return {
        "vocab": config.vocab_size,
        "width": config.hidden_size,
        "two_widths": 2 * config.hidden_size,
        "features": config.intermediate_size,
        "heads": config.num_heads,
        "query_rows": query,
        "key_rows": key,
        "value_rows": value,
        "chunks": config.qkv_chunks,
        "chunk_rows": (query + key + value) // config.qkv_chunks,
        "head_outputs": config.num_heads * config.v_head_dim,
        "experts": config.num_experts,
        "router_rows": config.num_experts,
        "all_experts": config.num_experts,
        "expert_features": config.moe_intermediate_size,
    }


def _drafter_sizes(config: DrafterConfig) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "looked_up_vocab": config.vocab_size,
        "width": config.hidden_size,
        "same_width": config.hidden_size,
        "aux_widths": len(config.target_layer_ids) * config.hidden_size,
        "features": config.intermediate_size,
        "heads": config.num_heads,
        "query_rows": config.num_heads * config.head_dim,
        "key_rows": config.num_kv_heads * config.head_dim,
        "value_rows": config.num_kv_heads * config.head_dim,
        "head_outputs": config.num_heads * config.head_dim,
        "head": config.head_dim,
        "rank": config.bias_rank,
        "match_lengths": LONGEST_MATCH + 1,
    }


def _weight(row: Row, sizes: dict[str, int], file_format: FileFormat, path: str, name: str, layer_kind: int) -> Weight:
    stored, axes = file_format.of(row.kind), row.axes.split()
    shape, tree_path = tuple(sizes[axis] for axis in axes), tuple((path + row.path).split("/"))
    split = {"experts": "stack", "code_channels": "stack", "chunks": "chunks"}.get(axes[0], "whole")
    plain = HF_DTYPES[file_format.router if row.kind == "router" else file_format.dtype]
    parts = tuple(
        Part(tree_path, field, name + row.name + suffix, dtype or plain, part_shape, split)
        for (field, suffix, dtype), part_shape in zip(_PARTS[stored], _part_shapes(stored, shape))
    )
    return Weight(tree_path, row, stored, shape, parts, layer_kind)


def _part_shapes(stored: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    if stored == "fp8":
        return shape, grid_shape(shape)
    if stored == "mxfp4":
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


def expected_tensors(table: Iterator[Weight]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of a checkpoint with these weights, in the published layout."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for weight in table:
        for part, _, name in tensors_of(weight):
            if name in tensors:
                raise ValueError(f"the table gives {name} twice")
            tensors[name] = (part.dtype, part.tensor_shape)
    return tensors


def part_bytes(part: Part, sharding: jax.sharding.Sharding | None = None) -> int:
    """Bytes of an array, or of what one device holds of it."""
    shape = part.shape if sharding is None else sharding.shard_shape(part.shape)
    return math.prod(shape) * DTYPES[part.dtype].itemsize


def array_bytes(table: Iterator[Weight]) -> int:
    """Bytes of all arrays of the tree."""
    return sum(part_bytes(part) for weight in table for part in weight.parts)


def build_tree(table: Iterator[Weight], array_of: Callable[[Weight, Part], Any]) -> dict[str, Any]:
    """The parameter tree, of an array for each part."""
    tree: dict[str, Any] = {}
    for weight in table:
        node = tree
        for key in weight.path[:-1]:
            node = node.setdefault(key, {})
        node[weight.path[-1]] = weight.wrap([array_of(weight, part) for part in weight.parts])
    return tree


def abstract_tree(table: Iterator[Weight], sharding_of: ShardingOf | None = None) -> dict[str, Any]:
    """The parameter tree as shapes and dtypes, with a sharding for each array if given."""

    def array_of(weight: Weight, part: Part) -> jax.ShapeDtypeStruct:
        sharding = sharding_of(array_path(part), part.shape) if sharding_of else None
        return jax.ShapeDtypeStruct(part.shape, DTYPES[part.dtype], sharding=sharding)

    return build_tree(table, array_of)


def array_path(part: Part) -> tuple[str, ...]:
    """Names down to one array of the tree: ("layers_1", "moe", "gate", "codes")."""
    return (*part.path, part.field) if part.field else part.path
