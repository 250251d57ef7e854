"""The drafter's description: `dflash/config.json` as one frozen, validated dataclass.

Published values: `dflash/config.json` of MiMo-V2.5-Pro-FP4-DFlash.
"""

from __future__ import annotations

import dataclasses

from mimo_jax.config.model import MAX_BLOCK, ModelConfig
from mimo_jax.config.numbers import INT32_END, fits_devices
from mimo_jax.errors import UserError

# Which of the two bases rotates (the context's keys, the block's queries and keys). Engines disagree; "drafter" is what
# the serving stacks do.
ROTARY_BASES = {
    "drafter": ("rope_theta", "rope_theta"),
    "backbone": ("backbone_rotary_base", "backbone_rotary_base"),
    "mixed": ("backbone_rotary_base", "rope_theta"),
}

LONGEST_MATCH = 8  # tokens up to the anchor that prompt lookup compares


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """Geometry of a DFlash drafter, which shares width, embedding and head with its target."""

    hidden_size: int  # D, the target's
    intermediate_size: int  # F
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # Q, of keys and of values
    target_layer_ids: tuple[int, ...]  # whose hidden states it reads, each after its layer; -1: the embedding
    num_target_layers: int
    vocab_size: int  # only ids below it are proposed; the target's table may have more rows
    mask_token_id: int
    window: int  # context tokens that a block row sees, counted back from its own position
    block_size: int = 8  # N: the anchor and what is drafted after it
    rope_theta: float = 1e4
    backbone_rotary_base: float | None = None
    rotary_base: str = "drafter"
    partial_rotary_factor: float = 0.5
    value_scale: float = 1.0
    has_sink: bool = True
    norm_eps: float = 1e-5
    bias_rank: int = 0  # of the order-aware bias (DSpark, arXiv 2607.05147); 0: none
    lookup: int = 0  # newest tokens in which prompt lookup finds a guess for every draft to start from; 0: no guesses
    acceptance_length: float | None = None  # tokens per round measured with the target it was trained for
    published_acceptance_length: float | None = None  # the same of `published`, where that is less than all of it
    max_position: int = 262_144
    dtype: str = "bfloat16"  # of activations
    init_range: float = 0.02

    def __post_init__(self) -> None:
        for field, (holds, expected) in _RULES.items():
            value = getattr(self, field)
            if not holds(value):
                raise UserError(f"drafter: {field}={value!r} must be {expected}")
        if self.window < self.block_size:
            raise UserError(f"drafter: window={self.window} must be at least block_size={self.block_size}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"drafter: num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if max(self.target_layer_ids) >= self.num_target_layers:
            raise UserError(
                f"drafter: target_layer_ids={list(self.target_layer_ids)} must lie below "
                f"num_target_layers={self.num_target_layers}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"drafter: head_dim={self.head_dim} x partial_rotary_factor={self.partial_rotary_factor} gives "
                f"{self.rotary_dim} rotary dimensions; an even number within head_dim is needed"
            )
        if self.rotary_base != "drafter" and self.backbone_rotary_base is None:
            raise UserError(f"drafter: rotary_base={self.rotary_base!r} needs backbone_rotary_base")

    @property
    def has_extras(self) -> bool:
        """Whether it goes beyond the published format."""
        return self.bias_rank > 0 or self.lookup > 0

    @property
    def published(self) -> DrafterConfig:
        """The drafter without its extras, as other engines read it."""
        if not self.has_extras:
            return self
        accepted = {"acceptance_length": self.published_acceptance_length, "published_acceptance_length": None}
        return dataclasses.replace(self, bias_rank=0, lookup=0, **accepted)

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def context_theta(self) -> float:
        """Rotary base of the context's keys."""
        return getattr(self, ROTARY_BASES[self.rotary_base][0])

    @property
    def block_theta(self) -> float:
        """Rotary base of the block's queries and keys."""
        return getattr(self, ROTARY_BASES[self.rotary_base][1])

    def check_fits(self, target: ModelConfig) -> None:
        """Raises, naming both values, unless this drafter was made for a target of this geometry."""
        for field, mine, theirs in (
            ("hidden_size", self.hidden_size, target.hidden_size),
            ("num_target_layers", self.num_target_layers, target.num_layers),
        ):
            if mine != theirs:
                raise UserError(f"drafter: {field}={mine}, but the target has {theirs}")
        for field, rows in (("vocab_size", self.vocab_size), ("mask_token_id", self.mask_token_id + 1)):
            if rows > target.vocab_size:
                raise UserError(
                    f"drafter: {field}={getattr(self, field)}, but the target's table has {target.vocab_size} rows"
                )


def _is_whole(value, low: int, high: int = INT32_END) -> bool:
    return type(value) is int and low <= value < high


_COUNT = (lambda value: _is_whole(value, 1), "a positive integer")
_POSITIVE = (fits_devices, "a positive number below 2^31")
_POSITIVE_OR_NONE = (lambda value: value is None or fits_devices(value), "a positive number")
_RULES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"), _COUNT),
    **dict.fromkeys(("head_dim", "num_target_layers", "vocab_size", "window", "max_position"), _COUNT),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "value_scale", "norm_eps", "init_range"), _POSITIVE),
    "dtype": (lambda value: value in ("bfloat16", "float32"), "bfloat16 or float32"),
    "target_layer_ids": (
        lambda ids: isinstance(ids, tuple) and len(ids) > 0 and all(_is_whole(i, -1) for i in ids),
        "a list of layer numbers",
    ),
    "mask_token_id": (lambda value: _is_whole(value, 0), "a token id"),
    "block_size": (lambda value: _is_whole(value, 2, MAX_BLOCK + 1), f"a whole number in 2..{MAX_BLOCK}"),
    **dict.fromkeys(("backbone_rotary_base", "acceptance_length", "published_acceptance_length"), _POSITIVE_OR_NONE),
    "rotary_base": (
        lambda value: isinstance(value, str) and value in ROTARY_BASES,
        f"one of {', '.join(ROTARY_BASES)}",
    ),
    "has_sink": (lambda value: isinstance(value, bool), "true or false"),
    "bias_rank": (lambda value: _is_whole(value, 0), "0 or a rank"),
    "lookup": (lambda value: _is_whole(value, 0, 1 << 20), "0 or a number of tokens below 2^20"),
}
