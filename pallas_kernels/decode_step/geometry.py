"""What a decode step has to know of a model and of its drafter: sizes and constants, no weights."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: which keys its queries see, and what its FFN is."""

    is_sliding: bool
    has_experts: bool


@dataclasses.dataclass(frozen=True)
class Target:
    """Geometry of a MiMo-V2 text model. Sizes are element counts; letters as in `mimo_jax/glossary.md`."""

    vocab: int  # C
    width: int  # D
    layers: tuple[Layer, ...]
    heads: int  # H
    global_kv_heads: int  # K
    sliding_kv_heads: int  # K
    head_dim: int  # Q
    value_dim: int  # V
    features: int  # F of dense layers
    expert_features: int  # F of an expert
    experts: int  # E
    chosen: int  # X
    window: int  # keys that a sliding layer sees, the query's own included
    rotary: int  # dimensions that are rotated
    chunks: int  # J: of the fused QKV rows, each [Q heads, K heads, V heads]
    global_theta: float
    sliding_theta: float
    value_scale: float
    norm_eps: float

    def kv_heads(self, layer: Layer) -> int:
        return self.sliding_kv_heads if layer.is_sliding else self.global_kv_heads

    def qkv_rows(self, layer: Layer) -> int:
        """Output rows of a layer's QKV projection."""
        return self.heads * self.head_dim + self.kv_heads(layer) * (self.head_dim + self.value_dim)

    def index_of_kind(self, index: int) -> int:
        """How many layers with the same kind of attention come before layer `index`."""
        kind = self.layers[index].is_sliding
        return sum(layer.is_sliding == kind for layer in self.layers[:index])


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Geometry of a DFlash drafter, which shares width, embedding and head with its target."""

    target_vocab: int  # C
    vocab: int  # ids below it are proposed
    width: int  # D
    features: int  # F
    num_layers: int
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # Q, of keys and of values
    aux_layers: tuple[int, ...]  # of the target, each after its layer; -1: the embedding
    block: int  # N: the anchor and the drafts
    window: int
    rotary: int
    context_theta: float
    block_theta: float
    value_scale: float
    norm_eps: float
    has_sink: bool
    bias_rank: int  # 0: no order-aware bias
    lookup: int  # newest tokens in which guesses are looked up; 0: none
    longest_match: int

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim
