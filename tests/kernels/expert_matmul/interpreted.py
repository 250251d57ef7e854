"""Runs the Hopper kernels in Pallas' interpreter and compares; a process of its own, because failures can hang.

python -m tests.kernels.expert_matmul.interpreted CASE
"""

import sys

import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.expert_matmul import expert_ffn, mosaic_gpu, tile_experts
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


def machine(processors: int, consumers: int) -> mosaic_gpu.Machine:
    """With a ring of two slots for each warpgroup that computes, so that each slot is used again and again."""
    return mosaic_gpu.Machine(processors, consumers, 2 * consumers, InterpretGPUParams(detect_races=True))


def compare(tokens: int, case: str, machine: mosaic_gpu.Machine, features: int = 256) -> None:
    packed = packed_experts(features=features)
    experts = on_device(tile_experts(packed))
    x, ids, weights = tokens_of(tokens), routing(tokens, case), weights_of(tokens)
    found = mosaic_gpu.expert_ffn(x, ids, weights, experts, 0, EXPERTS, machine)
    assert not gpu_callbacks.get_races().races_found
    assert relative_error(found, definition(x, ids, weights, packed)) < 1e-3  # the bound on W4A16
    assert relative_error(found, np.asarray(expert_ffn(x, ids, weights, experts), np.float64)) < 1e-3


def invariance() -> None:
    """A token's result in a block of 1, 4 and 8, with other neighbours, experts and processors."""
    packed = packed_experts()
    experts = on_device(tile_experts(packed))
    x, ids, weights = tokens_of(8), routing(8, "mixed"), weights_of(8)
    results = []
    for first, last, on in ((3, 4, machine(1, 1)), (0, 4, machine(1, 1)), (0, 8, machine(2, 1))):
        block = slice(first, last)
        y = mosaic_gpu.expert_ffn(x[block], ids[block], weights[block], experts, 0, EXPERTS, on)
        assert not gpu_callbacks.get_races().races_found
        assert relative_error(y, definition(x[block], ids[block], weights[block], packed)) < 1e-3
        results.append(np.asarray(y)[3 - first])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


CASES = {
    "one expert": lambda: compare(16, "one expert", machine(2, 1)),
    "elsewhere, two slices": lambda: compare(3, "some elsewhere", machine(1, 2), 512),
    "invariance": invariance,
}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
    print("agreed")
