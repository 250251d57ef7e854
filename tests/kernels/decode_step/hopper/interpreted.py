"""Runs the protocol in Pallas' interpreter and compares; a process of its own, because failures can hang.

python -m tests.kernels.decode_step.hopper.interpreted devices CTAs [how it is broken]
"""

import functools
import os
import sys
import threading
import traceback
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import thread_map

from tests.kernels.decode_step.hopper.protocol import (
    BLOCKS,
    CHUNKS,
    LAYERS,
    PARITY,
    ROWS,
    TOKENS,
    WIDTH,
    Machine,
    in_chunks,
    launch,
    samples,
    state_of,
    table_of,
)


def expected(start: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """The round in float64: [BLOCKS, TOKENS, ROWS]."""
    widen, narrow = (weight.astype(np.float64) for weight in weights)
    x = start.transpose(1, 0, 2).reshape(TOKENS, WIDTH).astype(np.float64)
    for layer in range(LAYERS):
        x = x + sum(np.tanh(x @ wide[layer].T) @ back[layer].T for wide, back in zip(widen, narrow))
    return x.reshape(TOKENS, BLOCKS, ROWS).transpose(1, 0, 2)


def in_rank_order(start: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """What the residual must be to the bit, from all layers' sums as they arrived [PARITY, ranks, ...]."""
    assert LAYERS == PARITY  # so that none was overwritten
    return functools.reduce(np.add, [start, *(sums for layer in parts for sums in layer)])


def check(devices: int, ctas: int, broken: str) -> None:
    """Rounds: near the definition, and sums in the order of ranks on each, bit for bit."""
    machine = Machine(devices, ctas, 2)
    starts, weights = samples(devices)
    cut = [in_chunks(weight, name) for weight, name in zip(weights, CHUNKS)]
    state = state_of(machine)
    run = jax.jit(functools.partial(launch, machine, broken))
    for epoch, start in enumerate(starts):
        state = run(np.full(1, epoch, np.int32), table_of(machine), start, cut, state)
        x, parts = np.asarray(state[2]), np.asarray(state[-1])
        error = np.abs(x - expected(start, weights)).max()
        print(f"round {epoch}: error {error:.2g}", flush=True)
        assert error < 1e-5
        for device in range(devices):
            np.testing.assert_array_equal(x[device], in_rank_order(start, parts[device]))


def spread_threads() -> None:
    """A CPU device runs 32 computations at once, on as many threads as there are devices; simulated ones are more.

    The interpreter keeps the first device. Simulated threads run on others, and share a compilation, not one each.
    """
    jax.config.update("jax_num_cpu_devices", 48)
    lock, programs = threading.Lock(), {}

    def run_elsewhere(jaxpr: Any, consts: Any, thread: Any, *arguments: Any) -> None:
        number = 1 + int(thread) // 24
        with jax.default_device(jax.devices()[number]):
            with lock:
                if number not in programs:
                    program = jax.jit(functools.partial(jax.core.eval_jaxpr, jaxpr))
                    programs[number] = program.lower(consts, thread, *arguments).compile()
            jax.block_until_ready(programs[number](consts, thread, *arguments))

    def run_or_end(*arguments: Any) -> None:
        try:
            run_elsewhere(*arguments)
        except Exception:
            traceback.print_exc()
            os._exit(1)  # others may wait for this thread for ever

    thread_map._run_jaxpr = run_or_end


if __name__ == "__main__":
    spread_threads()
    check(int(sys.argv[1]), int(sys.argv[2]), " ".join(sys.argv[3:]))
    print("agreed", flush=True)
