"""How near attention over a long cache comes to the memory's bandwidth, and the compiler's own way beside it.

python -m pallas_kernels.attention.benchmark [--tokens 1 8 256] [--contexts 1024 8192 131072] [--backends ...]

The tokens are the last of the context. Calls go round several caches, which together are larger than the L2 cache but
for the shortest context. Fractions are bytes of keys and values over time, against the datasheet; many tokens are held
up by their products instead, so operations per second are beside them. Without a GPU: a small shape, the reference
alone, and no fraction of anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import BACKENDS, attend_long
from pallas_kernels.attention.shapes import SHAPES, Shape
from pallas_kernels.timing import DATASHEET, seconds

CACHE_BYTES = 128 << 20  # of all caches
MAX_CACHES = 64  # calls of one program

Caches = list[tuple[jax.Array, jax.Array]]


def draw(shape: Shape, tokens: int, context: int, count: int) -> tuple[jax.Array, jax.Array, Caches]:
    """Queries, their positions, and that many caches."""
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    seeds = iter(jax.random.split(jax.random.key(0), 1 + 2 * count))
    q = normal(next(seeds), (1, tokens, shape.heads, shape.key_width), jnp.bfloat16)

    def rows(width: int) -> jax.Array:
        return normal(next(seeds), (1, shape.kv_heads, context, width), jnp.bfloat16)

    caches = [(rows(shape.key_width), rows(shape.value_width)) for _ in range(count)]
    return q, context - tokens + jnp.arange(tokens)[None], caches


def all_caches(backend: str) -> Any:
    """Attention over one cache after the other in one program, each waiting for the one before."""

    @jax.jit
    def run(q: jax.Array, query: jax.Array, caches: Caches) -> jax.Array:
        for keys, values in caches:
            out = attend_long(q, keys, values, query, None, backend=backend)
            q = q + (1e-6 * jnp.mean(out)).astype(q.dtype)
        return q

    return run


def check(backend: str, shape: Shape, tokens: int, context: int) -> float:
    """Relative L2 distance to the reference in float32."""
    q, query, [(keys, values)] = draw(shape, tokens, context, 1)
    run = jax.jit(attend_long, static_argnames="backend")
    wide = (x.astype(jnp.float32) for x in (q, keys, values))
    found, wanted = run(q, keys, values, query, None, backend=backend), run(*wide, query, None, backend="reference")
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def measure(backend: str, shape: Shape, tokens: int, context: int, args: argparse.Namespace) -> dict:
    """Milliseconds of one call, the bytes per second of the keys and values it needs, operations per second."""
    nbytes = context * shape.position_bytes
    count = max(2, min(args.caches, CACHE_BYTES // nbytes))
    calls = seconds(all_caches(backend), *draw(shape, tokens, context, count), repeats=args.repeats)
    times = [call / count for call in calls]
    median = statistics.median(times)
    return {
        "tokens": tokens,
        "context": context,
        "bytes": nbytes,
        "ms": 1e3 * median,
        "ms_spread": [1e3 * min(times), 1e3 * max(times)],
        "bytes_per_second": nbytes / median,
        "flop_per_second": 2 * tokens * shape.heads * context * (shape.key_width + shape.value_width) / median,
        "error": check(backend, shape, tokens, context),
    }


def compare(backend: str, shape: Shape, args: argparse.Namespace, has_gpu: bool) -> dict:
    """One backend at every number of tokens and context; what keeps it from running, if something does."""
    rows: list[dict] = []
    try:
        for tokens in args.tokens:
            for context in args.contexts:
                row = measure(backend, shape, tokens, context, args)
                if has_gpu:
                    row["of_datasheet"] = row["bytes_per_second"] / DATASHEET
                rows.append(row)
                of = f"{row['of_datasheet']:6.2f}" if has_gpu else ""
                print(f"{backend:10} {tokens:4} tokens {context:7} keys {row['ms']:8.4f} ms {of}", flush=True)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as problem:
        print(f"{backend:10} cannot: {problem}", flush=True)
        return {"rows": rows, "cannot": str(problem)}
    return {"rows": rows}


def main() -> None:
    has_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="pro-tp8" if has_gpu else "small")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 256] if has_gpu else [1, 8])
    contexts = [1024, 8192, 131072] if has_gpu else [1024]
    parser.add_argument("--contexts", nargs="+", type=int, default=contexts)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS if has_gpu else ["reference"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--caches", type=int, default=MAX_CACHES if has_gpu else 2)
    args = parser.parse_args()
    results = {name: compare(name, SHAPES[args.shape], args, has_gpu) for name in args.backends}
    report = {"shape": args.shape, "device": jax.devices()[0].device_kind}
    print(json.dumps(report | {"backends": results}))


if __name__ == "__main__":
    main()
