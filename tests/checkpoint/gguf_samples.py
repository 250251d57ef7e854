"""Small GGUF files of Llama-type models, written without the code under test."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = ["def area(width, height):\n    return width * height  # 1234 m²\n", "It isn't so: we'll see 42 of them."] * 3
# Number of a type -> its code for struct.
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
OF_PYTHON = {bool: 7, int: 4, float: 6, str: 8}


@dataclasses.dataclass(frozen=True)
class Raw:
    """A tensor as the file has it: ggml's number of its type, its shape, its bytes."""

    kind: int
    shape: tuple[int, ...]
    data: bytes


@dataclasses.dataclass(frozen=True)
class Typed:
    """A value of a type that Python's own does not tell."""

    kind: int
    value: Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    vocab: int = 300
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    features: int = 128
    base: float = 5000.0

    @property
    def head(self) -> int:
        return self.width // self.heads


def f32(array: np.ndarray) -> Raw:
    return Raw(0, array.shape, np.asarray(array, "<f4").tobytes())


def gguf_bytes(values: dict[str, Any], tensors: dict[str, Raw], version: int = 3, alignment: int = 32) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(values))
    for name, value in values.items():
        head += _text(name) + _value(value)
    body = b""
    for name, tensor in tensors.items():
        dims = tensor.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.kind, len(body))
        body += tensor.data + bytes(-len(tensor.data) % alignment)
    return head + bytes(-len(head) % alignment) + body


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind = 5 if isinstance(value[0], int) else OF_PYTHON[type(value[0])]
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(_bare(kind, item) for item in value)
    kind = value.kind if isinstance(value, Typed) else OF_PYTHON[type(value)]
    return struct.pack("<I", kind) + _bare(kind, value.value if isinstance(value, Typed) else value)


def _bare(kind: int, value: Any) -> bytes:
    return _text(value) if kind == 8 else struct.pack("<" + CODES.get(kind, "I"), value)


def trained(vocab: int, *pre: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE that cuts text into words by `pre`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(pre))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def smollm(vocab: int) -> tokenizers.Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return trained(vocab, digits, pre_tokenizers.ByteLevel(add_prefix_space=False))


def vocabulary(tokenizer: tokenizers.Tokenizer, pre: str = "smollm") -> dict[str, Any]:
    """What a GGUF says of a tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()} | {"tokenizer.chat_template": TEMPLATE}


def hyperparameters(shape: Shape) -> dict[str, Any]:
    values = {
        "block_count": shape.layers,
        "context_length": 128,
        "embedding_length": shape.width,
        "feed_forward_length": shape.features,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": shape.base,
        "rope.dimension_count": shape.head,
    }
    return {"general.architecture": "llama"} | {f"llama.{name}": value for name, value in values.items()}


def shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a model without a head of its own."""
    width, features, keys = shape.width, shape.features, shape.kv_heads * shape.head
    layer = {
        **{"attn_norm": (width,), "ffn_norm": (width,), "attn_output": (width, width), "attn_q": (width, width)},
        **{"attn_k": (keys, width), "attn_v": (keys, width)},
        **{"ffn_gate": (features, width), "ffn_up": (features, width), "ffn_down": (width, features)},
    }
    top = {"token_embd.weight": (shape.vocab, width), "output_norm.weight": (width,)}
    return top | {f"blk.{i}.{name}.weight": size for i in range(shape.layers) for name, size in layer.items()}


def random_weights(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    means = {name: 1.0 if "norm" in name else 0.0 for name in shapes(shape)}
    return {name: rng.normal(means[name], 0.12, size).astype(np.float32) for name, size in shapes(shape).items()}


def write_llama(path: Path, shape: Shape = Shape(), **changes: Any) -> None:
    """A file of the float32 weights of `random_weights`; `changes` are those of `values_of`."""
    tensors = {name: f32(array) for name, array in random_weights(shape).items()}
    path.write_bytes(gguf_bytes(values_of(shape, **changes), tensors))


def values_of(shape: Shape, **changes: Any) -> dict[str, Any]:
    """All values of a file. `changes` replace some, by names with double underscores for dots; None leaves one out."""
    values = hyperparameters(shape) | vocabulary(smollm(shape.vocab))
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in values.items() if value is not None}
