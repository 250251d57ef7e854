"""Bad GGUF files: one line that names the file and the field, whatever is in them."""

import dataclasses
import random
import struct
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mimo_jax.checkpoint.gguf import from_gguf, gguf_files, read_gguf
from mimo_jax.errors import UserError
from tests.checkpoint.gguf_samples import Raw, Shape, Typed, f32, gguf_bytes, random_weights, values_of
from tests.tools.fuzz import mutate_bytes

SHAPE = Shape(layers=1)
WEIGHTS = {name: f32(array) for name, array in random_weights(SHAPE).items()}
VALUES = values_of(SHAPE)


def with_values(**changes) -> bytes:
    return gguf_bytes(values_of(SHAPE, **changes), WEIGHTS)


def with_tensors(**changes) -> bytes:
    tensors = WEIGHTS | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return gguf_bytes(VALUES, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def patched(data: bytes, at: int, code: str, number: int) -> bytes:
    size = struct.calcsize(code)
    return data[:at] + struct.pack(code, number) + data[at + size :]


GOOD = gguf_bytes(VALUES, WEIGHTS)
# Where the type and the offset of the first tensor are: after its name and its two axes.
FIRST = GOOD.index(b"token_embd.weight") + len(b"token_embd.weight")
AXES, KIND, OFFSET = FIRST + 4, FIRST + 20, FIRST + 24
TOKENS = GOOD.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
INFINITE = dataclasses.replace(WEIGHTS["output_norm.weight"], data=np.full(64, np.inf, "<f4").tobytes())
BAD = {
    "empty": (b"", "does not begin with GGUF"),
    "another format": (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
    "version 1": (patched(GOOD, 4, "<I", 1), "version 1; expected 2 or 3"),
    "big-endian": (patched(GOOD, 4, ">I", 3), "version 50331648"),
    "cut in the header": (GOOD[:900], "cut short"),
    "cut in the data": (GOOD[:-40], "tensor 'blk.0.ffn_down.weight': lies at .* cut short"),
    "absurd tensor count": (patched(GOOD, 8, "<Q", 2**60), "tensor count: claims 1152921504606846976"),
    "absurd value count": (patched(GOOD, 16, "<Q", 2**64 - 1), "value count: claims 18446744073709551615"),
    "absurd list": (patched(GOOD, TOKENS, "<Q", 2**61), "tokenizer.ggml.tokens: length: claims 2305843009213693952"),
    "absurd axis": (patched(GOOD, AXES, "<Q", 2**62), "tensor 'token_embd.weight'"),
    "no axes": (patched(GOOD, FIRST, "<I", 0), "tensor 'token_embd.weight': 0 axes"),
    "empty axis": (patched(GOOD, AXES, "<Q", 0), "tensor 'token_embd.weight': F32 of shape .*300, 0"),
    "unknown type": (patched(GOOD, KIND, "<I", 12), "tensor 'token_embd.weight': has ggml's type 12; known: F32"),
    "part of a block": (patched(patched(GOOD, KIND, "<I", 8), AXES, "<Q", 48), "Q8_0 of shape .*multiple of 32"),
    "offset beyond the end": (patched(GOOD, OFFSET, "<Q", 2**50), "tensor 'token_embd.weight': lies at"),
    "offset within another": (patched(GOOD, OFFSET, "<Q", 32), "lies at bytes"),
    "crooked offset": (patched(GOOD, OFFSET, "<Q", 7), "tensor 'token_embd.weight': offset 7 is no multiple"),
    "alignment": (with_values(general__alignment=24), "general.alignment=24 must be a power of two"),
    "text as alignment": (with_values(general__alignment="32"), "general.alignment='32' must be"),
    "another architecture": (
        with_values(general__architecture="mamba"),
        "general.architecture='mamba' must be .*llama",
    ),
    "no architecture": (with_values(general__architecture=None), "general.architecture=None"),
    "list as architecture": (with_values(general__architecture=[1, 2]), "general.architecture="),
    "no width": (with_values(llama__embedding_length=None), "missing llama.embedding_length"),
    "width in text": (with_values(llama__embedding_length="64"), "llama.embedding_length=.* must be a whole number"),
    "width of 48": (with_values(llama__embedding_length=48), "llama.embedding_length=48: must be a multiple of 32"),
    "absurd layers": (with_values(llama__block_count=4_000_000_000), "llama.block_count=4000000000 must be"),
    "absent layers": (with_values(llama__block_count=2), "missing 'blk.1.attn_k.weight'"),
    "no heads": (with_values(llama__attention__head_count=0), "llama.attention.head_count=0"),
    "odd heads": (with_values(llama__attention__head_count_kv=3), "num_heads=4 must be a multiple"),
    "NaN": (with_values(llama__rope__freq_base=float("nan")), "llama.rope.freq_base=nan must be a number"),
    "half a head rotated": (with_values(llama__rope__dimension_count=8), "llama.rope.dimension_count=8: expected 16"),
    "scaled positions": (with_values(llama__rope__scaling__type="yarn"), "llama.rope.scaling.type='yarn'.*not support"),
    "experts": (with_values(llama__expert_count=8), "llama.expert_count=8: is not supported"),
    "another vocabulary": (with_values(llama__vocab_size=301), "llama.vocab_size=301: expected 300"),
    "sentencepiece": (with_values(tokenizer__ggml__model="llama"), "tokenizer.ggml.model='llama' must be one of gpt2"),
    "unknown words": (with_values(tokenizer__ggml__pre="falcon"), "tokenizer.ggml.pre='falcon' must be one of"),
    "too few kinds": (
        with_values(tokenizer__ggml__token_type=[1, 1]),
        "tokenizer.ggml.token_type must be a list of 300",
    ),
    "a token twice": (with_values(tokenizer__ggml__tokens=["a"] * 300), "tokenizer.ggml.tokens has a token twice"),
    "a merge of three": (with_values(tokenizer__ggml__merges=["a b c"]), "tokenizer.ggml.merges has 'a b c'"),
    "an id too large": (with_values(tokenizer__ggml__eos_token_id=300), "tokenizer.ggml.eos_token_id=300 must be"),
    "a bias": (with_tensors(blk__0__attn_q__bias=f32(np.zeros(64))), "does not have: 'blk.0.attn_q.bias'"),
    "no norm": (with_tensors(output_norm__weight=None), "missing 'output_norm.weight'"),
    "another shape": (with_tensors(output_norm__weight=f32(np.ones(32))), r"'output_norm.weight' has shape \[32\]"),
    "infinity": (with_tensors(output_norm__weight=INFINITE), "tensor 'output_norm.weight': value inf at index"),
    "long name": (with_tensors(**{"x" * 300: WEIGHTS["output_norm.weight"]}), "name of a tensor: claims 300; at most"),
    "two lines in a name": (with_tensors(**{"a\nb": WEIGHTS["output_norm.weight"]}), "not printable"),
    "a value of no type": (with_values(one=Typed(99, 0)), "one: has type 99"),
}


def outcome(path: Path) -> str:
    """Reads all that a conversion reads."""
    try:
        read_gguf(path)
        gguf_files(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 700, str(error)[:2000]
        return "rejected"
    return "accepted"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name):
    """The file, the field, what was found."""
    data, expected = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=expected):
        from_gguf(path, tmp_path / "out")
    assert outcome(path) == "rejected"
    assert not (tmp_path / "out").exists()


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A changed number, or changed bytes, of the header or of the whole."""
    header = len(data) if rng.random() < 0.1 else data.index(b"blk.0.ffn_down.weight") + 50
    if rng.random() < 0.4:
        code = rng.choice(("<I", "<Q"))
        number = rng.choice((0, 1, 2, 9, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1))
        return patched(data, rng.randrange(header - 8), code, number % 2 ** (8 * struct.calcsize(code)))
    return mutate_bytes(rng, data[:header]) + data[header:]


def test_two_thousand_mutated_files(tmp_path, unchecked):
    """Nothing but one line or success, and never more memory than a few times the file."""
    data = gguf_bytes(VALUES, {name: q8_0(tensor.shape) for name, tensor in WEIGHTS.items()})
    path = tmp_path / "mutated.gguf"
    path.write_bytes(data)
    assert outcome(path) == "accepted"
    outcomes: Counter[str] = Counter()
    tracemalloc.start()
    for case in range(2000):
        path.write_bytes(mutate(random.Random(case), data))
        tracemalloc.reset_peak()
        try:
            outcomes[outcome(path)] += 1
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < 20 * len(data), f"case {case}: {peak} bytes"
    tracemalloc.stop()
    assert outcomes["rejected"] > 800 and outcomes["accepted"] > 50, outcomes


def q8_0(shape: tuple[int, ...]) -> Raw:
    blocks = np.zeros((int(np.prod(shape)) // 32, 34), np.uint8)
    blocks[:, 1] = 0x2C  # a scale of 1/16
    return Raw(8, shape, blocks.tobytes())
