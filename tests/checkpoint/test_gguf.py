"""A Llama-type GGUF becomes a MiMo checkpoint that computes the same, and speaks with the same tokens."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from mimo_jax.checkpoint.convert import carried_files, to_huggingface, verify
from mimo_jax.checkpoint.files.gguffile import GgufFile
from mimo_jax.checkpoint.gguf import from_gguf, read_gguf
from mimo_jax.checkpoint.read import read
from mimo_jax.decode.sampling import Greedy
from mimo_jax.errors import UserError
from mimo_jax.generation import generate
from mimo_jax.loading import load
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.serving.template import ChatTemplate
from mimo_jax.tokenizer import Tokenizer
from tests.checkpoint.gguf_samples import (
    SPECIAL,
    TEXT,
    Raw,
    Shape,
    f32,
    gguf_bytes,
    random_weights,
    smollm,
    trained,
    values_of,
    vocabulary,
    write_llama,
)

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-4  # of float32 logits; 3e-6 measured at this size


def our_logits(found, tokens: np.ndarray) -> np.ndarray:
    config = dataclasses.replace(found.config, dtype="float32")
    return np.asarray(jax.jit(Backbone(config).apply)({"params": found.params}, tokens)[0])


@pytest.mark.parametrize("has_head", [False, True], ids=["tied", "own head"])
def test_logits_are_those_of_transformers(tmp_path, has_head):
    """Before any rounding, float32 logits are LlamaForCausalLM's: experts, router, rotation and heads are in place."""
    torch = pytest.importorskip("torch", reason="transformers needs torch")
    transformers = pytest.importorskip("transformers")
    shape = Shape()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=shape.features,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": shape.base},
            tie_word_embeddings=not has_head,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        mean, scale = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
        parameter.data = mean + scale * torch.randn(parameter.shape, generator=generator)
    tensors = {name: f32(array) for name, array in as_llama_cpp(theirs, shape, has_head).items()}
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(values_of(shape), tensors))
    tokens = np.random.default_rng(0).integers(0, shape.vocab, (2, 40)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    assert expected.std() > 1, "logits must be of a realistic scale"
    found = read_gguf(tmp_path / "model.gguf")
    assert (found.config.num_experts, found.config.experts_per_token) == (4, 4)
    np.testing.assert_allclose(our_logits(found, tokens), expected, atol=TOLERANCE, rtol=0)


def as_llama_cpp(model, shape: Shape, has_head: bool) -> dict[str, np.ndarray]:
    """The torch weights under llama.cpp's names; it wants rotated pairs side by side, as its converter puts them."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}

    def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
        return rows.reshape(heads, 2, shape.head // 2, -1).swapaxes(1, 2).reshape(rows.shape)

    found = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    if has_head:
        found["output"] = state["lm_head.weight"]
    for index in range(shape.layers):
        theirs, ours = f"model.layers.{index}", f"blk.{index}"
        names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        names |= {f"attn_{one}": f"self_attn.{one}_proj" for one in "qkv"} | {"attn_output": "self_attn.o_proj"}
        names |= {f"ffn_{one}": f"mlp.{one}_proj" for one in ("gate", "up", "down")}
        found |= {f"{ours}.{name}": state[f"{theirs}.{of}.weight"] for name, of in names.items()}
        for name, heads in (("attn_q", shape.heads), ("attn_k", shape.kv_heads)):
            found[f"{ours}.{name}"] = permuted(found[f"{ours}.{name}"], heads)
    return {f"{name}.weight": array for name, array in found.items()}


def block_values(kind: int, block: bytes) -> list[float]:
    """What ggml's documentation says of a block, one weight after the other."""
    half = np.frombuffer(block[:4] if kind != 8 else block[:2], np.float16).astype(np.float64)
    if kind == 8:
        return [half[0] * code for code in np.frombuffer(block[2:], np.int8).tolist()]
    codes = block[2:] if kind == 2 else block[4:]
    low_then_high = [byte & 15 for byte in codes] + [byte >> 4 for byte in codes]
    return [half[0] * (code - 8) if kind == 2 else half[0] * code + half[1] for code in low_then_high]


@pytest.mark.parametrize(("kind", "size"), [(2, 18), (3, 20), (8, 34)], ids=["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_read_as_ggml_means_them(tmp_path, kind, size):
    """Scales, minima, and the order of halves of bytes."""
    rng = np.random.default_rng(kind)
    blocks = rng.integers(0, 256, (6, size), dtype=np.uint8)
    scales = rng.normal(size=(6, 2 if kind == 3 else 1)).astype(np.float16)
    blocks[:, : 2 * scales.shape[1]] = scales.view(np.uint8)
    path = tmp_path / "blocks.gguf"
    path.write_bytes(gguf_bytes({}, {"one": Raw(kind, (3, 64), blocks.tobytes())}))
    expected = np.reshape([block_values(kind, block.tobytes()) for block in blocks], (3, 64))
    found = GgufFile(path).read("one")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(0, "f4"), (1, "f2"), (30, ml_dtypes.bfloat16)], ids=["F32", "F16", "BF16"]
)
def test_plain_types_are_exact(tmp_path, kind, dtype):
    weights = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    path = tmp_path / "plain.gguf"
    path.write_bytes(gguf_bytes({}, {"one": Raw(kind, (3, 5), weights.tobytes())}))
    np.testing.assert_array_equal(GgufFile(path).read("one"), weights.astype(np.float32))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A folder with model.gguf and what it became."""
    folder = tmp_path_factory.mktemp("converted")
    write_llama(folder / "model.gguf")
    from_gguf(folder / "model.gguf", folder / "mimo")
    return folder


def test_a_converted_model_is_a_published_checkpoint(converted):
    """MXFP4 experts, FP8 projections and a manifest; it loads as any other."""
    assert verify(converted / "mimo")["verified"]
    found = read(converted / "mimo")
    assert found.file_format.name == "mxfp4"
    model = load(converted / "mimo")
    assert model.stop_ids == (0, 2)  # <|endoftext|> ends a text, too
    assert len(generate(model, "def", Greedy(), max_tokens=4).tokens) <= 4


def test_a_gguf_is_read_wherever_a_checkpoint_is(converted):
    """Other converters take it, and write the same: calibrated rounding can start from its float32 weights."""
    assert read(converted / "model.gguf").file_format.of("expert") == "dense"
    to_huggingface(converted / "model.gguf", converted / "other")
    (shard,) = (path.name for path in (converted / "mimo").glob("*.safetensors"))
    assert (converted / "other" / shard).read_bytes() == (converted / "mimo" / shard).read_bytes()
    assert set(carried_files(converted / "model.gguf")) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }


def test_the_parts_of_an_mlp_add_up_to_it(converted):
    """Exactly, as parts of the matrices: `down` is stored times the number of experts, by which the router divides."""
    weights = random_weights(Shape())
    moe = read_gguf(converted / "model.gguf").params["layers_1"]["moe"]
    np.testing.assert_array_equal(moe["gate"].reshape(-1, 64), weights["blk.1.ffn_gate.weight"])
    joined = np.concatenate(list(moe["down"]), axis=1)
    np.testing.assert_array_equal(joined, 4 * weights["blk.1.ffn_down.weight"])
    assert not moe["router"].any() and not moe["router_bias"].any()


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def by_words(pattern: str) -> tokenizers.Tokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return trained(330, split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


@pytest.mark.parametrize(
    ("pre", "tokenizer"),
    [
        ("smollm", smollm(330)),
        ("gpt-2", trained(330, pre_tokenizers.ByteLevel(add_prefix_space=False))),
        ("qwen2", by_words(QWEN2)),
        ("llama-bpe", by_words(LLAMA3)),
    ],
    ids=["smollm", "gpt-2", "qwen2", "llama-bpe"],
)
def test_the_tokenizer_comes_along(tmp_path, pre, tokenizer):
    """Text, unseen text and special tokens get the ids of the tokenizer that the file was made from, and back."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama", **vocabulary(tokenizer, pre)}, {}))
    (tmp_path / "tokenizer.json").write_bytes(carried_files(path)["tokenizer.json"])
    found = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in (*TEXT, "Ünïcode\r\n  12345, don't  \t stop", "<|im_start|>user\nhello<|im_end|>\n"):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert found.encode(text) == expected
        assert found.decode(expected, visible=range(3)) == text
    assert found.encode("<|im_end|>") == [2] != found.encode("<|im_end|>", literal=True)


def test_the_chat_template_comes_along(converted):
    tokenizer = Tokenizer.load(converted / "mimo" / "tokenizer.json")
    prompt = ChatTemplate.load(converted / "mimo", tokenizer).render([{"role": "user", "content": "hello"}])
    assert prompt.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.ids[0] == SPECIAL.index("<|im_start|>")
    config = json.loads((converted / "mimo" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")


def test_the_command_says_what_it_made(converted, tmp_path):
    """One line of JSON, and in words that a converted model is not sparse."""
    command = [sys.executable, ROOT / "scripts" / "convert.py", "from-gguf", converted / "model.gguf", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "4 experts in each of 2 layers, all chosen" in done.stderr and "not MiMo's sparsity" in done.stderr
    assert json.loads(done.stdout)["experts"] == 4


def test_what_was_cut_short_is_refused_before_it_is_written(converted, tmp_path):
    data = (converted / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"cut\.gguf: tensor 'blk\.1\..*cut short"):
        from_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]
