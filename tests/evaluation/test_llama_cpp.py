"""What llama.cpp is given: GGUF files with our numbers, and its bench's answers."""

import dataclasses
import struct

import jax
import numpy as np
import pytest

from mimo_jax.checkpoint.huggingface import read_checkpoint
from mimo_jax.errors import UserError
from mimo_jax.evaluation import gguf, llama_cpp
from mimo_jax.evaluation.random_checkpoint import SMALL, write_random
from mimo_jax.generation import generate
from mimo_jax.loading import load
from mimo_jax.weights import dequantize, quantize_mx
from pallas_kernels import mxfp4

CONFIG = dataclasses.replace(
    SMALL, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_experts=8, head_dim=24, v_head_dim=16
)


def test_mxfp4_blocks_hold_the_same_codes():
    """Byte i of a block: element i low, element i + 16 high, after the scale."""
    weights = quantize_mx(np.random.default_rng(0).normal(size=(2, 3, 64)).astype(np.float32))
    made = gguf.mx(weights)
    blocks = np.frombuffer(made.data, np.uint8).reshape(2, 3, 2, 17)
    codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
    assert made.shape == (2, 3, 64)
    np.testing.assert_array_equal(codes.reshape(2, 3, 64), mxfp4.unpack(weights.codes))
    np.testing.assert_array_equal(blocks[..., 0], weights.scales)


def test_q8_0_rounds_to_half_a_step():
    """Every weight lies within half a step, and a little for the scale's float16, of what a reader computes."""
    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    weights[0, :32] = 0
    blocks = np.frombuffer(gguf.q8_0(weights).data, np.uint8).reshape(8, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    decoded = blocks[:, 2:].copy().view(np.int8) * scales
    assert np.all(np.abs(decoded - weights.reshape(8, 32)) <= scales * (0.5 + 127 * 2**-11) + 1e-9)


def test_q8_0_needs_whole_blocks():
    with pytest.raises(UserError, match="multiple of 32"):
        gguf.q8_0(np.zeros((2, 48), np.float32))


def test_a_random_checkpoint_loads_and_converts(tmp_path):
    """It generates; the same seed gives the same bytes; the file has every tensor where its header says."""
    for name in "ab":
        write_random(tmp_path / name, CONFIG, seed=3)
    (shard,) = (tmp_path / "a").glob("model-*.safetensors")
    assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()
    assert len(generate(load(tmp_path / "a"), [1, 2, 3], max_tokens=4).tokens) == 4
    llama_cpp.convert(tmp_path / "a", tmp_path / "a.gguf", "bf16")
    data = (tmp_path / "a.gguf").read_bytes()
    magic, version, tensors, _ = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3)
    embed = jax.tree.map(np.asarray, read_checkpoint(tmp_path / "a").params["embed"])
    assert tensors == 3 + 8 * 4 + 6 + 3 + 7 * 5  # whole, per layer, sinks, dense MLP, experts
    assert dequantize(embed, "bfloat16").tobytes() in data


@pytest.mark.parametrize("arguments", [{}, {"prompt": 8, "generate": 8}])
def test_rates_want_one_of_prompt_and_generate(tmp_path, arguments):
    with pytest.raises(ValueError, match="one of them"):
        llama_cpp.rates(tmp_path, tmp_path, **arguments)


def test_rates_are_read_from_the_bench(tmp_path):
    """A stand-in that repeats what it was asked for."""
    bench = tmp_path / "bench"
    bench.write_text('#!/bin/sh\necho "$@" > $0.log\necho \'[{"samples_ts": [10.5, 11.0]}]\'\n')
    bench.chmod(0o755)
    assert llama_cpp.rates(bench, tmp_path / "m.gguf", prompt=256, batch=8, depth=128, repeats=2) == [10.5, 11.0]
    asked = (tmp_path / "bench.log").read_text()
    assert "-p 256 -n 0 -d 128 -t 2 -r 2" in asked
    assert "-b 8 -ub 8" in asked


def test_a_program_that_fails_is_one_line(tmp_path):
    bench = tmp_path / "bench"
    bench.write_text("#!/bin/sh\necho first >&2\necho 'no such model' >&2\nexit 3\n")
    bench.chmod(0o755)
    with pytest.raises(UserError, match="exit code 3: no such model"):
        llama_cpp.rates(bench, tmp_path / "m.gguf", generate=8)
