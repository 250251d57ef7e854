"""How much of the memory's bandwidth the experts reach, beside other ways to multiply them, in one run.

python -m pallas_kernels.expert_matmul.benchmark [--shape pro-tp8] [--tokens 1 ... 256] [--backends ...] [--repeats 7]

Up to 16 tokens are blocks of decoding, 256 a chunk of a prompt. Each token draws its experts uniformly without
replacement, anew in every round; stacks are larger than the L2 cache. Fractions are bytes of the active experts' codes
and scales over time, against the datasheet and against a streaming read measured in the same run. Without a GPU: a
small shape, the reference alone, and no fraction of anything.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.expert_matmul import BACKENDS, PackedExperts, expert_ffn, to_hopper
from pallas_kernels.expert_matmul.reference import active_experts, coefficients, reader
from pallas_kernels.expert_matmul.shapes import SHAPES, Shape
from pallas_kernels.timing import DATASHEET, seconds

OTHERS = ("scaled_dot", "bf16_grouped")
PEERS = ("vllm", "sglang", "flashinfer", "marlin", "humming")  # that hold W4 kernels for Hopper
STREAM_BYTES = 4 << 30
ROUNDS = 32  # of one measurement, each with routing of its own

Run = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]  # experts, tokens, ids, combine weights


def draw_experts(shape: Shape, seed: int = 0) -> PackedExperts:
    """Uniform codes, scales of 2**-9 to 2**-6: outputs of scale 1 for tokens of scale 1, about."""
    keys = iter(jax.random.split(jax.random.key(seed), 6))

    def stack(rows: int, cols: int) -> tuple[jax.Array, jax.Array]:
        codes = jax.random.bits(next(keys), (shape.experts, rows, cols // 2), jnp.uint8)
        return codes, 118 + jax.random.bits(next(keys), (shape.experts, rows, cols // 32), jnp.uint8) % 4

    wide = shape.features, shape.hidden
    return PackedExperts(stack(*wide), stack(*wide), stack(shape.hidden, shape.features))


def draw_routing(shape: Shape, tokens: int, rounds: int, seed: int = 1) -> np.ndarray:
    """Ids [rounds, tokens, chosen]."""
    order = np.random.default_rng(seed).random((rounds, tokens, shape.experts)).argpartition(shape.chosen, axis=-1)
    return order[..., : shape.chosen].astype(np.int32)


def scaled_dot(experts: PackedExperts, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """The reference's loop, with `jax.lax.scaled_dot` for its products."""
    num_experts = experts.sizes[0]
    active = jnp.unique(ids, size=min(num_experts, ids.size), fill_value=num_experts)

    def product(x: jax.Array, stack: tuple[jax.Array, jax.Array], expert: jax.Array) -> jax.Array:
        codes = jax.lax.bitcast_convert_type(stack[0][expert], jnp.float4_e2m1fn)
        scales = jax.lax.bitcast_convert_type(stack[1][expert], jnp.float8_e8m0fnu)
        return jax.lax.scaled_dot(
            x,
            codes.reshape(codes.shape[0], -1),
            rhs_scale=scales,
            dimension_numbers=(((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def visit(index: jax.Array, y: jax.Array) -> jax.Array:
        expert = active[index]
        hidden = jax.nn.silu(product(x, experts.gate, expert)) * product(x, experts.up, expert)
        return y + coefficients(ids, weights, expert) * product(hidden.astype(x.dtype), experts.down, expert)

    return jax.lax.fori_loop(0, jnp.sum(active < num_experts), visit, jnp.zeros(x.shape, jnp.float32))


def expand(experts: PackedExperts) -> tuple[jax.Array, ...]:
    """Gate, up and down as bf16 [E, I, O], expert by expert."""
    read = jax.jit(lambda experts, index: tuple(m.T for m in reader(experts, jnp.bfloat16)(index)))
    matrices = [read(experts, jnp.asarray(index)) for index in range(experts.sizes[0])]
    return tuple(jnp.stack(stack) for stack in zip(*matrices))


def bf16_grouped(experts: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """XLA's grouped product of expanded experts: 3.8 times the bytes, no decoding."""
    gate, up, down = experts
    order = jnp.argsort(ids.reshape(-1))
    sizes = jnp.bincount(ids.reshape(-1), length=gate.shape[0])

    def grouped(rows: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, stack, sizes, preferred_element_type=jnp.float32)

    rows = x[order // ids.shape[1]]
    hidden = (jax.nn.silu(grouped(rows, gate)) * grouped(rows, up)).astype(x.dtype)
    y = jnp.zeros((ids.size, x.shape[1])).at[order].set(grouped(hidden, down))
    return jnp.sum(y.reshape(*ids.shape, -1) * weights[..., None], axis=1)


def prepare(name: str, packed: PackedExperts) -> tuple[Run, Any]:
    """A way to run the op, and the experts as it takes them."""
    if name == "scaled_dot":
        return scaled_dot, packed
    if name == "bf16_grouped":
        return bf16_grouped, expand(packed)
    experts = jax.jit(to_hopper)(packed) if name == "mosaic_gpu" else packed
    return lambda experts, x, ids, weights: expert_ffn(x, ids, weights, experts, backend=name), experts


def rounds_of(run: Run) -> Callable:
    """All rounds in one program, each waiting for the one before."""

    @jax.jit
    def rounds(experts: Any, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        def step(x: jax.Array, ids_TX: jax.Array) -> tuple[jax.Array, None]:
            return (x + 1e-6 * run(experts, x, ids_TX, weights)).astype(x.dtype), None

        return jax.lax.scan(step, x, ids)[0]

    return rounds


def measure(
    run: Run, experts: Any, shape: Shape, tokens: int, args: argparse.Namespace, ids: np.ndarray | None = None
) -> dict:
    """Microseconds of one round, and the bytes per second of active experts."""
    ids = draw_routing(shape, tokens, args.rounds) if ids is None else ids
    x = jax.random.normal(jax.random.key(2), (tokens, shape.hidden), jnp.bfloat16)
    weights = jnp.full((tokens, shape.chosen), 1 / shape.chosen, jnp.float32)
    calls = seconds(rounds_of(run), experts, x, jnp.asarray(ids), weights, repeats=args.repeats)
    times = [call / args.rounds for call in calls]
    distinct = statistics.mean(len(set(block.ravel().tolist())) for block in ids)
    median = statistics.median(times)
    return {
        "tokens": tokens,
        "experts": distinct,
        "bytes": distinct * shape.expert_bytes,
        "us": 1e6 * median,
        "us_spread": [1e6 * min(times), 1e6 * max(times)],
        "bytes_per_second": distinct * shape.expert_bytes / median,
    }


def streaming_read(repeats: int) -> float:
    """Bytes per second of a sum over an array much larger than any cache."""
    data = jnp.ones(STREAM_BYTES // 4, jnp.int32)
    return STREAM_BYTES / statistics.median(seconds(jax.jit(jnp.sum), data, repeats=repeats))


def check(run: Run, experts: Any, packed: PackedExperts, shape: Shape, tokens: int) -> float:
    """Relative L2 distance to the reference, in float32, on one block."""
    x = jax.random.normal(jax.random.key(3), (tokens, shape.hidden), jnp.bfloat16)
    ids = jnp.asarray(draw_routing(shape, tokens, 1)[0])
    weights = jnp.full(ids.shape, 1 / shape.chosen, jnp.float32)

    @jax.jit
    def expected(packed: PackedExperts, x: jax.Array) -> jax.Array:
        return active_experts(x, ids, weights, reader(packed, jnp.float32), shape.experts)

    found, wanted = jax.jit(run)(experts, x, ids, weights), expected(packed, x.astype(jnp.float32))
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def compare(name: str, packed: PackedExperts, shape: Shape, args: argparse.Namespace, stream: float | None) -> dict:
    """One backend at every number of tokens; what keeps it from running, if something does."""
    try:
        run, experts = prepare(name, packed)
        error = check(run, experts, packed, shape, max(args.tokens))
        result: dict[str, Any] = {"error": error, "rows": []}
        for tokens in args.tokens:
            row = measure(run, experts, shape, tokens, args)
            if stream is not None:
                row["of_datasheet"] = row["bytes_per_second"] / DATASHEET
                row["of_stream"] = row["bytes_per_second"] / stream
            result["rows"].append(row)
            of = f"{row['of_datasheet']:6.2f} {row['of_stream']:6.2f}" if stream is not None else ""
            print(f"{name:12} {tokens:3} tokens {row['experts']:6.1f} experts {row['us']:10.1f} us {of}", flush=True)
        if name == "mosaic_gpu":
            # Few experts, so that all of them lie in L2: how fast it decodes when memory does not hold it up.
            same = np.broadcast_to(np.arange(shape.chosen, dtype=np.int32), (args.rounds, 8, shape.chosen))
            result["from_l2"] = measure(run, experts, shape, 8, args, same)
        return result
    except (NotImplementedError, jax.errors.JaxRuntimeError) as problem:
        print(f"{name:12} cannot: {problem}", flush=True)
        return {"cannot": str(problem)}


def main() -> None:
    has_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="pro-tp8" if has_gpu else "small")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 256])
    names = [*BACKENDS, *OTHERS]
    parser.add_argument("--backends", nargs="+", choices=names, default=names if has_gpu else ["reference"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=ROUNDS if has_gpu else 2)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    stream = streaming_read(args.repeats) if has_gpu else None
    if stream is not None:
        print(f"streaming read {stream / 1e12:.2f} TB/s, {stream / DATASHEET:.2f} of the datasheet", flush=True)
    packed = draw_experts(shape)
    peers = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    results = {name: compare(name, packed, shape, args, stream) for name in args.backends}
    report = {"shape": args.shape, "device": jax.devices()[0].device_kind, "streaming_read": stream}
    print(json.dumps(report | {"routing": "uniform", "importable_peers": peers, "backends": results}))


if __name__ == "__main__":
    main()
