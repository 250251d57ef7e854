"""The model's description: one frozen, validated dataclass, and the presets. `hf_config` reads and writes it.

Published values: MiMo-V2.5-Pro, MiMo-V2.5 (text part) and MiMo-V2-Flash `config.json`.
Axis letters used throughout the package are listed in `mimo_jax/glossary.md`.
"""

from __future__ import annotations

import dataclasses

from mimo_jax.errors import UserError

GLOBAL, SLIDING = 0, 1
MAX_BLOCK = 8  # the longest block of tokens that a cache can take back, so the longest that can be drafted

# Where each storage keeps its weights: format of QKV and dense MLPs, of the routed experts, of all other matrices.
STORAGE_FORMATS = {
    "dense": ("dense", "dense", "dense"),  # plain arrays of `param_dtype`: training, bf16 checkpoints
    "fp8": ("fp8", "fp8", "dense"),  # the published FP8 checkpoints
    "mxfp4": ("fp8", "mxfp4", "dense"),  # the published FP4-DFlash checkpoint
    "tiled": ("fp8", "tiled", "dense"),  # the same bits as "mxfp4", in the order in which the Hopper kernel reads them
    "unpacked": ("turned", "unpacked", "turned"),  # a turned array per expert, never sliced: fastest under XLA on CPU
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Geometry and numerics of a MiMo-V2 text model. Sizes are element counts; see the glossary for the letters."""

    vocab_size: int  # C
    hidden_size: int  # D
    layer_pattern: tuple[int, ...]  # per layer: 0 global, 1 sliding
    moe_pattern: tuple[int, ...]  # per layer: 0 dense FFN, 1 routed experts
    num_heads: int  # H
    num_kv_heads: int  # K on global layers
    sliding_num_kv_heads: int  # K on sliding layers
    head_dim: int  # Q
    v_head_dim: int  # V
    intermediate_size: int  # F of dense layers
    moe_intermediate_size: int  # F of one expert
    num_experts: int  # E
    experts_per_token: int  # X
    rope_theta: float
    sliding_rope_theta: float
    sliding_window: int  # keys visible from a sliding layer, the query's own included
    partial_rotary_factor: float = 0.334
    value_scale: float = 1.0
    sink_on_sliding: bool = True
    sink_on_global: bool = False
    norm_eps: float = 1e-5
    max_position: int = 1_048_576
    mtp_layers: int = 0
    qkv_layout: str = "fused_qkv"  # or "split": how the projection is stored
    storage: str = "dense"
    dtype: str = "bfloat16"  # of activations
    param_dtype: str = "bfloat16"  # of weights that are neither quantised nor the router's
    expert_backend: str | None = None  # of `pallas_kernels.expert_matmul.BACKENDS`; None: what the device runs fastest
    init_range: float = 0.02
    architecture: str = "MiMoV2ForCausalLM"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in _POSITIVE_FIELDS:
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 2**40:
                raise UserError(f"config: {field}={value!r} must be a positive number")
        for field in _INTEGER_FIELDS:
            if type(getattr(self, field)) is not int:
                raise UserError(f"config: {field}={getattr(self, field)!r} must be an integer")
        if self.mtp_layers < 0:
            raise UserError(f"config: mtp_layers={self.mtp_layers} must not be negative")
        for field in ("sink_on_sliding", "sink_on_global"):
            if not isinstance(getattr(self, field), bool):
                raise UserError(f"config: {field}={getattr(self, field)!r} must be true or false")
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or not 0 <= value < self.vocab_size):
                raise UserError(f"config: {field}={value!r} must be a token id below vocab_size={self.vocab_size}")
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise UserError(f"config: {field}={getattr(self, field)!r} must be one of {', '.join(choices)}")
        for field in ("layer_pattern", "moe_pattern"):
            if not all(entry in (0, 1) for entry in getattr(self, field)):
                raise UserError(f"config: {field}={getattr(self, field)} may hold only 0 and 1")
        if len(self.layer_pattern) != len(self.moe_pattern) or not self.layer_pattern:
            raise UserError(
                f"config: layer_pattern has {len(self.layer_pattern)} entries, moe_pattern {len(self.moe_pattern)}; "
                "both need one per layer"
            )
        for field in ("num_kv_heads", "sliding_num_kv_heads"):
            self._require_multiple("num_heads", field)
        self._require_multiple("sliding_num_kv_heads", "num_kv_heads")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"config: experts_per_token={self.experts_per_token} must lie in 1..num_experts={self.num_experts}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"config: head_dim={self.head_dim} x partial_rotary_factor={self.partial_rotary_factor} gives "
                f"{self.rotary_dim} rotary dimensions; an even number within head_dim is needed"
            )
        for field in ("hidden_size", "moe_intermediate_size"):
            if self.expert_format in ("mxfp4", "tiled") and getattr(self, field) % 32:
                raise UserError(f"config: {field}={getattr(self, field)} must be a multiple of the MXFP4 block, 32")
        if self.storage == "unpacked" and not any(self.moe_pattern):
            raise UserError("config: storage='unpacked' needs at least one layer of experts")

    def _require_multiple(self, field: str, divisor_field: str) -> None:
        value, divisor = getattr(self, field), getattr(self, divisor_field)
        if value % divisor:
            raise UserError(f"config: {field}={value} must be a multiple of {divisor_field}={divisor}")

    @property
    def num_layers(self) -> int:
        return len(self.layer_pattern)

    @property
    def rotary_dim(self) -> int:
        """Truncated, not rounded: int(192 * 0.334) = 64."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def qkv_chunks(self) -> int:
        """Chunks of the fused projection: the tensor-parallel degree it was quantised for (8 for Pro, 4 for V2.5)."""
        return self.num_kv_heads

    @property
    def linear_format(self) -> str:
        return STORAGE_FORMATS[self.storage][0]

    @property
    def expert_format(self) -> str:
        return STORAGE_FORMATS[self.storage][1]

    @property
    def matrix_format(self) -> str:
        return STORAGE_FORMATS[self.storage][2]

    def kv_heads(self, kind: int) -> int:
        """Key/value heads of a layer of `kind` (GLOBAL or SLIDING)."""
        return self.sliding_num_kv_heads if kind == SLIDING else self.num_kv_heads

    def has_sink(self, kind: int) -> bool:
        return self.sink_on_sliding if kind == SLIDING else self.sink_on_global

    def theta(self, kind: int) -> float:
        return self.sliding_rope_theta if kind == SLIDING else self.rope_theta


_INTEGER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "sliding_num_kv_heads",
    "head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "experts_per_token",
    "sliding_window",
    "max_position",
    "mtp_layers",
)
_POSITIVE_FIELDS = (
    *(field for field in _INTEGER_FIELDS if field != "mtp_layers"),
    "rope_theta",
    "sliding_rope_theta",
    "partial_rotary_factor",
    "value_scale",
    "norm_eps",
    "init_range",
)
_CHOICES = {
    "qkv_layout": ("fused_qkv", "split"),
    "storage": tuple(STORAGE_FORMATS),
    "dtype": ("bfloat16", "float32"),
    "param_dtype": ("bfloat16", "float32"),
    "architecture": ("MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM"),
}

_PRO_GLOBAL_LAYERS = (0, 7, 15, 23, 31, 39, 47, 55, 62, 69)
_V25_GLOBAL_LAYERS = (0, 5, 11, 17, 23, 29, 35, 41, 47)


def _pattern(num_layers: int, global_layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(GLOBAL if layer in global_layers else SLIDING for layer in range(num_layers))


_PRO = ModelConfig(
    vocab_size=152_576,
    hidden_size=6144,
    layer_pattern=_pattern(70, _PRO_GLOBAL_LAYERS),
    moe_pattern=(0,) + (1,) * 69,
    num_heads=128,
    num_kv_heads=8,
    sliding_num_kv_heads=8,
    head_dim=192,
    v_head_dim=128,
    intermediate_size=16_384,
    moe_intermediate_size=2048,
    num_experts=384,
    experts_per_token=8,
    rope_theta=1e7,
    sliding_rope_theta=1e4,
    sliding_window=128,
    value_scale=0.612,
    mtp_layers=3,
    storage="mxfp4",
    bos_token_id=151_643,
    eos_token_id=151_645,
    pad_token_id=151_643,
)
_V25 = dataclasses.replace(
    _PRO,
    hidden_size=4096,
    layer_pattern=_pattern(48, _V25_GLOBAL_LAYERS),
    moe_pattern=(0,) + (1,) * 47,
    num_heads=64,
    num_kv_heads=4,
    num_experts=256,
    value_scale=0.707,
    storage="fp8",
)
PRESETS = {
    "mimo-v2.5-pro": _PRO,
    "mimo-v2.5": _V25,
    "mimo-v2-flash": dataclasses.replace(
        _V25, rope_theta=5e6, max_position=262_144, qkv_layout="split", architecture="MiMoV2FlashForCausalLM"
    ),
    # The bundled model. Every size divides by 8 devices; 96 QKV rows per chunk keep the padded scale grid in play.
    "mimo-tiny": dataclasses.replace(
        _PRO,
        vocab_size=4096,
        hidden_size=192,
        layer_pattern=(0, 1, 1, 0, 1, 1),
        moe_pattern=(0, 1, 1, 1, 1, 1),
        num_heads=8,
        head_dim=36,
        v_head_dim=24,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_experts=16,
        experts_per_token=2,
        rope_theta=1e4,
        sliding_window=64,
        max_position=1024,
        mtp_layers=1,
        storage="dense",
        param_dtype="float32",
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    ),
}


def preset(name: str) -> ModelConfig:
    """The named preset; an unknown name is an error that lists the known ones."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    return PRESETS[name]
