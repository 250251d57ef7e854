"""The geometry of a dense Llama-type GGUF as a MiMo model's.

Whatever would change the numbers and has no place in MiMo is refused by name: scaled rotary positions, biases, experts.
"""

from __future__ import annotations

import reprlib
from typing import Any

from mimo_jax.checkpoint.files.gguffile import GgufFile
from mimo_jax.checkpoint.vocabulary import Vocabulary
from mimo_jax.config.model import GLOBAL, MX_BLOCK, ModelConfig
from mimo_jax.errors import LARGEST, UserError, check_real, check_whole

ARCHITECTURE = "llama"
_READ = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
)
# Keys of other models, with the value at which they change nothing.
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none", "rope.scale_linear": 1.0}
_ROPE_BASE = 10_000.0  # where the file says nothing
_EXPERTS = (8, 4, 2, 1)  # as many as the published models choose per token, or fewer
_NAMED = 3  # how many tensors an error names


def vocabulary_of(file: GgufFile) -> Vocabulary:
    """A file of another architecture is refused as that, whatever its vocabulary."""
    file.one_of("general.architecture", (ARCHITECTURE,))
    return Vocabulary(file)


def config_of(file: GgufFile, vocabulary: Vocabulary) -> ModelConfig:
    """Raises what keeps a file from being such a model."""
    given = _Hyperparameters(file)
    width, features = given.multiple("embedding_length"), given.multiple("feed_forward_length")
    layers = given.whole("block_count", most=len(file.tensors))
    heads = given.whole("attention.head_count")
    kv_heads = given.whole("attention.head_count_kv", heads)
    head_dim = given.whole("attention.key_length", width // heads)
    given.must_be("rope.dimension_count", head_dim)
    given.must_be("vocab_size", vocabulary.size)
    experts = next(count for count in _EXPERTS if features % (count * MX_BLOCK) == 0)
    base, context = given.real("rope.freq_base", _ROPE_BASE), given.whole("context_length")
    try:
        config = ModelConfig(
            vocab_size=vocabulary.size,
            hidden_size=width,
            layer_pattern=(GLOBAL,) * layers,
            moe_pattern=(1,) * layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            sliding_num_kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=given.whole("attention.value_length", width // heads),
            intermediate_size=features,
            moe_intermediate_size=features // experts,
            num_experts=experts,
            experts_per_token=experts,
            rope_theta=base,
            sliding_rope_theta=base,
            sliding_window=context,
            partial_rotary_factor=1.0,
            sink_on_sliding=False,
            norm_eps=given.real("attention.layer_norm_rms_epsilon"),
            max_position=context,
            bos_token_id=vocabulary.token_id("bos"),
            eos_token_id=vocabulary.end_ids,
            pad_token_id=vocabulary.token_id("padding"),
        )
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    _check_tensors(file, config)
    return config


class _Hyperparameters:
    """The values below "llama."; what is wrong with one is an error that names it."""

    def __init__(self, file: GgufFile) -> None:
        self._where, self._values = str(file.path), file.values
        for name in (name for name in file.values if name.startswith(f"{ARCHITECTURE}.")):
            found, key = file.values[name], name.removeprefix(f"{ARCHITECTURE}.")
            is_neutral = isinstance(found, int | float | str) and found == _NEUTRAL.get(key)
            if key not in _READ and not is_neutral:
                raise self._wrong(name, found, "is not supported")

    def whole(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        name, value = self._given(key, default)
        check_whole(self._where, 1, most, **{name: value})
        return value

    def real(self, key: str, default: float | None = None) -> float:
        name, value = self._given(key, default)
        check_real(self._where, 0, LARGEST, **{name: value})
        return float(value)

    def multiple(self, key: str) -> int:
        """A size that MXFP4 can have."""
        if (value := self.whole(key)) % MX_BLOCK:
            raise self._wrong(f"{ARCHITECTURE}.{key}", value, f"must be a multiple of {MX_BLOCK}")
        return value

    def must_be(self, key: str, expected: int) -> None:
        """Where it is given."""
        if (value := self.whole(key, expected)) != expected:
            raise self._wrong(f"{ARCHITECTURE}.{key}", value, f"expected {expected}")

    def _given(self, key: str, default: Any) -> tuple[str, Any]:
        """Name and value; texts and lists, which no check accepts, in a few characters."""
        name = f"{ARCHITECTURE}.{key}"
        value = self._values.get(name, default)
        if value is None:
            raise UserError(f"{self._where}: missing {name}")
        return name, value if isinstance(value, int | float) else reprlib.repr(value)

    def _wrong(self, name: str, found: Any, rule: str) -> UserError:
        return UserError(f"{self._where}: {name}={reprlib.repr(found)}: {rule}")


def _check_tensors(file: GgufFile, config: ModelConfig) -> None:
    """Every expected tensor is there with its shape, and no other is. Without a head, it is the embedding."""
    expected = _shapes(config)
    if missing := sorted(expected.keys() - file.tensors.keys() - {"output.weight"}):
        raise UserError(f"{file.path}: missing {_quoted(missing)}")
    if extra := sorted(file.tensors.keys() - expected.keys()):
        raise UserError(f"{file.path}: tensors that a dense Llama does not have: {_quoted(extra)}")
    for name, tensor in file.tensors.items():
        if tensor.shape != expected[name]:
            found, needed = list(tensor.shape), list(expected[name])
            raise UserError(f"{file.path}: tensor {name!r} has shape {found}; expected {needed}")


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, features, heads = config.hidden_size, config.intermediate_size, config.num_heads
    of_model: dict[str, tuple[int, ...]] = {
        "token_embd": (config.vocab_size, width),
        "output": (config.vocab_size, width),
        "output_norm": (width,),
    }
    of_layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "attn_q": (heads * config.head_dim, width),
        "attn_k": (config.num_kv_heads * config.head_dim, width),
        "attn_v": (config.num_kv_heads * config.v_head_dim, width),
        "attn_output": (width, heads * config.v_head_dim),
        "ffn_norm": (width,),
        "ffn_gate": (features, width),
        "ffn_up": (features, width),
        "ffn_down": (width, features),
    }
    layers = range(config.num_layers)
    named = of_model | {f"blk.{index}.{name}": shape for index in layers for name, shape in of_layer.items()}
    return {f"{name}.weight": shape for name, shape in named.items()}


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_NAMED])) + (" and more" if len(names) > _NAMED else "")
