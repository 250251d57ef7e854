"""llama.cpp beside us, on the same weights and the same machine: built from source, given our checkpoint as GGUF.

Experts stay MXFP4 bit for bit, plain weights BF16. It has no FP8: those become Q8_0 (8.5 bits, rounded once more) or
BF16 (16 bits, rounded once more). It computes with float32 between matrices, and rounds what it multiplies with MXFP4
or Q8_0 to 8 bits, with BF16 to BF16: greedy texts part where two tokens are nearly as likely.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.checkpoint.files.gguffile import CONTROL, NORMAL, UNUSED
from mimo_jax.checkpoint.read import read
from mimo_jax.config.model import SLIDING, ModelConfig
from mimo_jax.errors import UserError
from mimo_jax.evaluation import gguf
from mimo_jax.evaluation.references import split_qkv
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.weights import BlockFp8Tensor, MxTensor, Params, StoredWeight, dequantize, expand
from mimo_jax.weights.params import STACKS

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"  # a source package that carries llama.cpp whole
_INSIDE = "vendor/llama.cpp"
BENCH = "llama-bench"
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    **dict.fromkeys(("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP"), "OFF"),
}
# What FP8 weights become.
FP8_AS: dict[str, Callable[[np.ndarray], gguf.Tensor]] = {"q8_0": gguf.q8_0, "bf16": gguf.bf16}
_MOSTLY_MXFP4 = 38  # what llama.h calls a file whose experts are


def build(folder: Path, source: Path | None = None, jobs: int | None = None, program: str = BENCH) -> Path:
    """A program of llama.cpp for this machine, compiled in `folder` and kept there; needs cmake and a C++ compiler.

    `source` is the package's archive or an unpacked llama.cpp; by default it is what `folder` has been built from, or
    pip fetches the archive from the index that it is configured for. `jobs` compilers run at once, by default one for
    each core.
    """
    built = folder / "build" / "bin" / program
    if built.exists():
        return built
    if absent := [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]:
        raise UserError(f"llama.cpp: not installed: {', '.join(absent)}; building it needs them")
    print(f"building {program}, once: this takes minutes", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    source = source or source_of(folder) or _download(folder)
    tree = source if source.is_dir() else _unpack(source, folder)
    options = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
    run("cmake", "-S", tree, "-B", folder / "build", *options)
    run("cmake", "--build", folder / "build", "--target", program, "--parallel", jobs or os.cpu_count() or 1)
    return built


def source_of(folder: Path) -> Path | None:
    """The llama.cpp that programs in `folder` were built from, if any were."""
    cache, key = folder / "build" / "CMakeCache.txt", "CMAKE_HOME_DIRECTORY:INTERNAL="
    lines = cache.read_text().splitlines() if cache.exists() else []
    return next((Path(line.removeprefix(key)) for line in lines if line.startswith(key)), None)


def _download(folder: Path) -> Path:
    where = ("--no-deps", "--no-binary", PACKAGE, "--dest", folder)
    run(sys.executable, "-m", "pip", "download", *where, f"{PACKAGE}=={VERSION}")
    return folder / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"


def _unpack(archive: Path, folder: Path) -> Path:
    """The folder of llama.cpp, out of the package's archive."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.partition("/")[2].startswith(f"{_INSIDE}/")]
        if not members:
            raise UserError(f"{archive}: holds no {_INSIDE}; expected the source package of {PACKAGE}")
        tar.extractall(folder, members, filter="data")
    return folder / members[0].name.partition("/")[0] / _INSIDE


def run(*command: object) -> str:
    """What a program prints; where it fails, the last line is the error."""
    words = [str(word) for word in command]
    ran = subprocess.run(words, capture_output=True, text=True)
    if ran.returncode:
        *_, last = (ran.stderr.strip() or ran.stdout.strip() or "it printed nothing").splitlines()
        raise UserError(f"{' '.join(words[:3])}: exit code {ran.returncode}: {last[:300]}")
    return ran.stdout


def rates(
    bench: Path,
    model: Path,
    prompt: int = 0,
    generate: int = 0,
    depth: int = 0,
    batch: int | None = None,
    threads: int = 2,
    repeats: int = 5,
    cache: str = "f16",
) -> list[float]:
    """Tokens per second of each repetition, after `depth` cached tokens, with random tokens and no sampling.

    Either `prompt` tokens are read, `batch` at a time if given, and the last of each batch gets logits; or `generate`
    tokens are read one by one. `cache` is the type of keys and values; f16 or bf16 is faster, by the widths of heads
    and the batch. The threads spin while they wait: beside other work on the same cores the rates say nothing.
    """
    if (prompt > 0) == (generate > 0):
        raise ValueError(f"prompt={prompt}, generate={generate}: one of them must be positive")
    options = {"-p": prompt, "-n": generate, "-d": depth, "-t": threads, "-r": repeats, "-ctk": cache, "-ctv": cache}
    if batch is not None:
        options |= {"-b": batch, "-ub": batch}
    words = [word for option in options.items() for word in option]
    (found,) = json.loads(run(bench, "-m", model, "-o", "json", *words))
    return found["samples_ts"]


def convert(directory: Path, out: Path, fp8_as: str = "q8_0") -> None:
    """Writes a checkpoint (Hugging Face or Orbax) as GGUF for llama.cpp's `mimo2`; `fp8_as` is a name of `FP8_AS`.

    Drafters and MTP layers stay behind.
    """
    if fp8_as not in FP8_AS:
        raise UserError(f"fp8_as={fp8_as!r} must be one of {', '.join(FP8_AS)}")
    found = read(directory)
    values = _values(found.config) | _vocabulary(directory / "tokenizer.json", found.config)
    gguf.write(out, values, _tensors(found.config, found.params, FP8_AS[fp8_as]))


def _values(config: ModelConfig) -> dict[str, Any]:
    """What llama.cpp calls hyperparameters. Its sliding window counts the query's own key, as ours does."""
    values = {
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": [config.kv_heads(kind) for kind in config.layer_pattern],
        "attention.key_length": config.head_dim,
        "attention.value_length": config.v_head_dim,
        "attention.value_scale": float(config.value_scale),
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == SLIDING for kind in config.layer_pattern],
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_theta),
        "rope.freq_base_swa": float(config.sliding_rope_theta),
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    general = {"general.architecture": "mimo2", "general.file_type": _MOSTLY_MXFP4}
    return general | {f"mimo2.{name}": value for name, value in values.items()}


def _vocabulary(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The tokenizer, byte-level BPE of the Qwen2 family; rows of the embedding without a token get a name."""
    tokenizer = json.loads(Tokenizer.load(path).backend.to_str())
    if tokenizer["model"]["type"] != "BPE":
        raise UserError(f"{path}: is {tokenizer['model']['type']}; expected BPE")
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = [f"[PAD{row}]" for row in range(config.vocab_size)]
    kinds = [UNUSED] * config.vocab_size
    for token, row in (tokenizer["model"]["vocab"] | special).items():
        tokens[row], kinds[row] = token, CONTROL if token in special else NORMAL
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    values: dict[str, Any] = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": kinds, "merges": merges}
    if isinstance(config.eos_token_id, int):
        values["eos_token_id"] = config.eos_token_id
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def _tensors(config: ModelConfig, params: Params, fp8: Callable[[np.ndarray], gguf.Tensor]) -> dict[str, gguf.Tensor]:
    """Every weight under llama.cpp's name; vectors and routers in float32, Q, K and V as one matrix."""

    def tensor(stored: StoredWeight, numbers: np.ndarray | None = None) -> gguf.Tensor:
        """`numbers`, by default the weight's own, in what its stored form becomes."""
        if isinstance(stored, MxTensor):
            return gguf.mx(stored)
        numbers = np.asarray(dequantize(stored, np.float32)) if numbers is None else numbers
        if isinstance(stored, BlockFp8Tensor):
            return fp8(numbers)
        return gguf.f32(numbers) if numbers.ndim == 1 or stored.dtype == np.float32 else gguf.bf16(numbers)

    params = jax.tree.map(np.asarray, params)
    tensors = {
        "token_embd.weight": tensor(params["embed"]),
        "output_norm.weight": tensor(params["norm"]["weight"]),
        "output.weight": tensor(params["head"]),
    }
    for index, kind in enumerate(config.layer_pattern):
        layer, prefix = params[f"layers_{index}"], f"blk.{index}"
        attention = layer["attention"]
        qkv = np.concatenate(split_qkv(config, kind, expand(attention)))
        tensors[f"{prefix}.attn_norm.weight"] = tensor(layer["input_norm"]["weight"])
        tensors[f"{prefix}.attn_qkv.weight"] = tensor(attention["qkv" if config.fused_qkv else "q"], qkv)
        tensors[f"{prefix}.attn_output.weight"] = tensor(attention["o"])
        tensors[f"{prefix}.ffn_norm.weight"] = tensor(layer["post_norm"]["weight"])
        if "sink" in attention:
            tensors[f"{prefix}.attn_sinks.weight"] = tensor(attention["sink"])
        ffn, suffix = (layer["moe"], "_exps") if "moe" in layer else (layer["mlp"], "")
        tensors |= {f"{prefix}.ffn_{name}{suffix}.weight": tensor(ffn[name]) for name in STACKS}
        if "moe" in layer:
            tensors[f"{prefix}.ffn_gate_inp.weight"] = tensor(ffn["router"])
            tensors[f"{prefix}.exp_probs_b.bias"] = tensor(ffn["router_bias"])
    return tensors
