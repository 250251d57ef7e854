"""How much of the memory's bandwidth a product by FP8 weights reaches, beside expanding the weights, in one run.

python -m pallas_kernels.fp8_matmul.benchmark [--shapes qkv gate down] [--tokens 1 8 16 256] [--backends ...]

A program multiplies by many weights one after another, more than the L2 cache holds. Fractions are bytes of codes,
scales, tokens and products over time, against the datasheet. Without a GPU: a small shape, the reference alone, and no
fraction of anything.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul import BACKENDS, BLOCK, fp8_matmul
from pallas_kernels.fp8_matmul.shapes import SHAPES, Shape
from pallas_kernels.timing import DATASHEET, seconds

EXPANDED = "expanded"
WEIGHTS_BYTES = 400e6  # eight times the L2 cache of an H200

Weight = tuple[jax.Array, jax.Array]  # codes and scales


def draw_weight(shape: Shape, seed: int) -> Weight:
    """Normal codes, scales that make products of scale 1 for tokens of scale 1."""
    dims = (shape.chunks, shape.rows, shape.cols)
    codes = jax.random.normal(jax.random.key(seed), dims).astype(jnp.float8_e4m3fn)
    return codes, jnp.full((shape.chunks, -(-shape.rows // BLOCK), shape.cols // BLOCK), shape.cols**-0.5)


def expanded(x_TI: jax.Array, codes_JOI: jax.Array, scales_Joi: jax.Array) -> jax.Array:
    """What XLA makes of it for many tokens: bf16 weights, written and read again."""
    spread_JOI = jnp.repeat(jnp.repeat(scales_Joi, BLOCK, axis=1), BLOCK, axis=2)[:, : codes_JOI.shape[1]]
    weights_JOI = (codes_JOI.astype(jnp.float32) * spread_JOI).astype(x_TI.dtype)
    return jnp.einsum("ti,joi->tjo", x_TI, weights_JOI, preferred_element_type=jnp.float32)


def measure(name: str, shape: Shape, weights: list[Weight], tokens: int, repeats: int) -> dict[str, Any]:
    """Microseconds of one product; what keeps it from running, if something does."""
    product = expanded if name == EXPANDED else functools.partial(fp8_matmul, backend=name)
    x_TI = jax.random.normal(jax.random.key(1), (tokens, shape.cols), jnp.bfloat16)

    @jax.jit
    def one_by_one(x_TI: jax.Array, weights: list[Weight]) -> list[jax.Array]:
        return [product(x_TI, *weight) for weight in weights]

    row: dict[str, Any] = {"backend": name, "tokens": tokens, "bytes": shape.nbytes(tokens)}
    try:
        times = [call / len(weights) for call in seconds(one_by_one, x_TI, weights, repeats=repeats)]
    except (NotImplementedError, jax.errors.JaxRuntimeError) as problem:
        return row | {"cannot": str(problem)}
    median = statistics.median(times)
    row |= {"us": 1e6 * median, "us_spread": [1e6 * min(times), 1e6 * max(times)]}
    return row | {"of_datasheet": row["bytes"] / median / DATASHEET} if jax.default_backend() == "gpu" else row


def main() -> None:
    has_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["qkv", "gate", "down"] if has_gpu else ["small"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 256])
    names = [*BACKENDS, EXPANDED]
    parser.add_argument("--backends", nargs="+", choices=names, default=names if has_gpu else ["reference"])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    results: dict[str, list[dict]] = {}
    for shape_name in args.shapes:
        shape = SHAPES[shape_name]
        count = round(WEIGHTS_BYTES / shape.nbytes(0)) if has_gpu else 2
        weights = [draw_weight(shape, seed) for seed in range(count)]
        results[shape_name] = []
        for tokens in args.tokens:
            for name in args.backends:
                row = measure(name, shape, weights, tokens, args.repeats)
                results[shape_name].append(row)
                print(shape_name, *(f"{key}={value}" for key, value in row.items()), flush=True)
    print(json.dumps({"device": jax.devices()[0].device_kind, "shapes": results}))


if __name__ == "__main__":
    main()
