"""Runs the Hopper kernels in Pallas' interpreter and compares; a process of its own, because failures can hang.

python -m tests.kernels.expert_matmul.interpreted CASE
"""

import sys

import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.expert_matmul import mosaic_gpu, to_hopper
from tests.kernels.expert_matmul.samples import (
    EXPERTS,
    definition,
    on_device,
    packed_experts,
    relative_error,
    routing,
    tokens_of,
    weights_of,
)


def launch(sms: int, consumers: int) -> mosaic_gpu.LaunchConfig:
    """With a pipeline of two stages for each warpgroup that computes, so that each stage is used again and again."""
    return mosaic_gpu.LaunchConfig(sms, consumers, 2 * consumers, InterpretGPUParams(detect_races=True))


def block(tokens: slice, case: str, features: int, launch: mosaic_gpu.LaunchConfig) -> np.ndarray:
    """Results of some of 40 tokens, checked against the definition."""
    packed = packed_experts(features=features)
    experts = on_device(to_hopper(packed))
    x, ids, weights = (array[tokens] for array in (tokens_of(40), routing(40, case), weights_of(40)))
    found = mosaic_gpu.expert_ffn(x, jnp.asarray(ids), weights, experts, 0, EXPERTS, launch)
    assert not gpu_callbacks.get_races().races_found
    assert relative_error(found, definition(x, ids, weights, packed)) < 1e-3  # the bound on W4A16
    return np.asarray(found)


def invariance() -> None:
    """A token's result in a block of 1, 4 and 8, with other neighbours, experts and SMs; two slices of down."""
    runs = (slice(3, 4), launch(1, 1)), (slice(0, 4), launch(1, 2)), (slice(0, 8), launch(2, 1))
    blocks = [block(tokens, "some elsewhere", 512, on)[3 - tokens.start] for tokens, on in runs]
    assert blocks[0].any()
    for result in blocks[1:]:
        np.testing.assert_array_equal(result, blocks[0])


def chunk_invariance() -> None:
    """A token's result in a chunk of 40, who all choose one expert beside another, and in a chunk of 17 of them."""
    whole = block(slice(0, 40), "one expert", 256, launch(1, 2))
    part = block(slice(20, 37), "one expert", 256, launch(1, 1))
    np.testing.assert_array_equal(part, whole[20:37])


def long_prompt() -> None:
    """Two chunks, the second with a token that is not there; about half of the choices are experts elsewhere."""
    mosaic_gpu.CHUNK_TOKENS = 18
    block(slice(0, 35), "some elsewhere", 256, launch(1, 1))


CASES = {
    "random routing": lambda: block(slice(0, 8), "mixed", 256, launch(2, 1)),
    "a long block": lambda: block(slice(0, 9), "one expert", 256, launch(1, 1)),
    "invariance": invariance,
    "chunk invariance": chunk_invariance,
    "a long prompt": long_prompt,
}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
    print("agreed")
