"""The model's description, and how files store its weights: two frozen, validated dataclasses.

Geometry says nothing of storage. What a device holds is a third thing (`mimo_jax.layouts`). `huggingface` reads and
writes both, `presets` names some. Axis letters used throughout the package are listed in `mimo_jax/glossary.md`.
"""

from __future__ import annotations

import dataclasses

from mimo_jax.config.numbers import FLOAT32_TINY, fits_devices
from mimo_jax.config.towers import MEDIA_TOKENS, AudioConfig, MediaConfig, VisionConfig
from mimo_jax.errors import UserError

GLOBAL, SLIDING = 0, 1
MAX_BLOCK = 16  # the longest block of tokens that a cache can take back, so the longest that can be drafted
MESH_BLOCK = 8  # the same on a mesh, where the rounds of all blocks have so many rows; the published block


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
    fused_qkv: bool = True  # one projection in chunks [Q heads, K heads, V heads]; else three
    dtype: str = "bfloat16"  # of activations
    init_range: float = 0.02
    architecture: str = "MiMoV2ForCausalLM"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None  # one, or several that all end a text
    pad_token_id: int | None = None
    vision: VisionConfig | None = None  # towers that a model of more than text has
    audio: AudioConfig | None = None
    media: MediaConfig | None = None

    def __post_init__(self) -> None:
        for field in _POSITIVE_FIELDS:
            if not fits_devices(value := getattr(self, field)):
                raise UserError(f"config: {field}={value!r} must be a positive number, from {FLOAT32_TINY} to 2^31")
        for field in _INTEGER_FIELDS:
            if type(getattr(self, field)) is not int:
                raise UserError(f"config: {field}={getattr(self, field)!r} must be an integer")
        if self.mtp_layers < 0:
            raise UserError(f"config: mtp_layers={self.mtp_layers} must not be negative")
        for field in ("sink_on_sliding", "sink_on_global", "fused_qkv"):
            if not isinstance(getattr(self, field), bool):
                raise UserError(f"config: {field}={getattr(self, field)!r} must be true or false")
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            ids = value if isinstance(value, tuple) and field == "eos_token_id" else (value,)
            is_known = [type(token) is int and 0 <= token < self.vocab_size for token in ids]
            if value is not None and not (is_known and all(is_known)):
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
        for field in ("vision", "audio"):
            tower = getattr(self, field)
            if tower is not None and tower.out_size != self.hidden_size:
                raise UserError(f"config: {field}.out_size={tower.out_size} must be hidden_size={self.hidden_size}")
        if (self.media is None) != (self.vision is None and self.audio is None):
            raise UserError("config: media must be given with a tower, and with one only")
        for field in MEDIA_TOKENS if self.media else ():
            if getattr(self.media, field) >= self.vocab_size:
                raise UserError(f"config: media.{field} must be a token id below vocab_size={self.vocab_size}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"config: head_dim={self.head_dim} x partial_rotary_factor={self.partial_rotary_factor} gives "
                f"{self.rotary_dim} rotary dimensions; an even number within head_dim is needed"
            )

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

    def kv_heads(self, kind: int) -> int:
        """Key/value heads of a layer of `kind` (GLOBAL or SLIDING)."""
        return self.sliding_num_kv_heads if kind == SLIDING else self.num_kv_heads

    def cached_numbers(self, global_rows: int, sliding_rows: int) -> int:
        """Numbers in so many rows of keys and values of every layer, by its kind."""
        rows = {GLOBAL: global_rows, SLIDING: sliding_rows}
        heads = sum(rows[kind] * self.kv_heads(kind) for kind in self.layer_pattern)
        return heads * (self.head_dim + self.v_head_dim)

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
    "dtype": ("bfloat16", "float32"),
    "architecture": ("MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM"),
}


# Format -> how QKV and dense MLPs are stored, and how routed experts are. Everything else is never quantised.
FORMATS = {
    "dense": {"linear": "dense", "expert": "dense"},  # BF16 checkpoints, and what training works on
    "fp8": {"linear": "fp8", "expert": "fp8"},  # the published FP8 checkpoints
    "mxfp4": {"linear": "fp8", "expert": "mxfp4"},  # the published FP4-DFlash checkpoint
}
MX_BLOCK = 32  # weights that share a scale


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """`name` of `FORMATS`, and the `dtype` of weights that are neither quantised nor the router's."""

    name: str = "dense"
    dtype: str = "bfloat16"
    router: str = "float32"

    def __post_init__(self) -> None:
        dtypes = _CHOICES["dtype"]
        for field, choices in (("name", tuple(FORMATS)), ("dtype", dtypes), ("router", dtypes)):
            if getattr(self, field) not in choices:
                raise UserError(f"file format: {field}={getattr(self, field)!r} must be one of {', '.join(choices)}")

    def of(self, kind: str) -> str:
        """How weights of a `kind` of `weights.params` are stored."""
        return FORMATS[self.name].get(kind, kind)

    def check_fits(self, config: ModelConfig) -> None:
        """Raises, naming the size, where experts of `config` cannot be stored in whole blocks."""
        for field in ("hidden_size", "moe_intermediate_size"):
            if self.of("expert") == "mxfp4" and getattr(config, field) % MX_BLOCK:
                raise UserError(
                    f"config: {field}={getattr(config, field)} must be a multiple of the MXFP4 block, {MX_BLOCK}"
                )


MASTERS = FileFormat("dense", "float32")  # what training works on
PUBLISHED = FileFormat("mxfp4", "bfloat16")  # MiMo-V2.5-Pro-FP4-DFlash
