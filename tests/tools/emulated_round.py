"""Runs the bundled model's rounds on the persistent kernel's program in NumPy, beside the modules in float32.

python -m tests.tools.emulated_round --ctas 6 --steps 2     # one to two minutes a step
"""

import argparse
import dataclasses

import jax
import numpy as np

import mimo_jax as mimo
from mimo_jax.checkpoint.read import read
from mimo_jax.config.geometry import target_of
from mimo_jax.layouts import persistent
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.cache import init_cache
from mimo_jax.weights import expand
from pallas_kernels.decode_step.hopper import state
from pallas_kernels.decode_step.hopper.plan import MOST_TOKENS, StepPlan
from pallas_kernels.decode_step.hopper.table import table_of
from tests.kernels.decode_step.hopper import threads
from tests.tiny import random_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ctas", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    found = read(mimo.BUNDLED)
    config, formats = dataclasses.replace(found.config, dtype="float32"), persistent.formats_of(found.params)
    plan = StepPlan(target_of(config), formats, MOST_TOKENS, 256, ctas=args.ctas)
    table, weights = table_of(plan), persistent.pack(config, found.params, plan)
    shapes = state.buffer_shapes(plan)
    buffers = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)
    params, step, cache = expand(found.params), jax.jit(Backbone(config).apply), init_cache(config, 1, 256)
    tokens_1T = random_tokens(config, 1, MOST_TOKENS * args.steps, seed=3)
    for start in range(0, tokens_1T.shape[1], MOST_TOKENS):
        block = tokens_1T[:, start : start + MOST_TOKENS]
        threads.run(plan, table.rows, [start, MOST_TOKENS, 0, table.rows.shape[1]], block[0], [weights], [buffers])
        logits, features, cache = step({"params": params}, block, cache, np.array([MOST_TOKENS]))
        expected, ours = np.asarray(logits)[0], buffers.logits.reshape(MOST_TOKENS, -1)
        is_best = buffers.best == np.argmax(expected, axis=-1)
        counts = buffers.expert_counts.reshape(-1, config.num_experts)
        print(
            f"tokens {start} to {start + MOST_TOKENS - 1}: logits of up to {np.abs(expected).max():.1f} differ by "
            f"{np.abs(ours - expected).max():.3f}; {is_best.sum()} of {MOST_TOKENS} most likely tokens are equal; "
            f"expert counts {'are' if np.array_equal(counts, features.expert_counts) else 'are not'}"
        )


if __name__ == "__main__":
    main()
