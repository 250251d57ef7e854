"""Measures speed. Two things are always compared within one run: timings on shared machines are noisy.

scripts/benchmark.py decode                # ms per token of the bundled model beside transformers (needs torch)
scripts/benchmark.py profile --trace DIR   # where a decode step's time goes
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from mimo_jax.cli import main_guard


def decode_command(args: argparse.Namespace) -> dict:
    import jax

    from mimo_jax.generation import generate
    from mimo_jax.model import BUNDLED, load

    model = load(args.model or BUNDLED, unpack=True)
    packed = load(args.model or BUNDLED, unpack=False)
    prompt = model.tokenizer.encode(args.prompt)
    runs = {
        "unpacked": lambda: generate(model, prompt, max_tokens=args.tokens),
        "packed": lambda: generate(packed, prompt, max_tokens=args.tokens),
    }
    record: dict = {"tokens": args.tokens, "repeats": args.repeats, "jax": jax.__version__}
    if not args.no_transformers:
        runs["transformers"] = transformers_run(model, prompt, args.tokens, record)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # compiles
    for _ in range(args.repeats):  # interleaved, so that a slow minute hits all of them
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - started) / args.tokens)
    for name, values in seconds.items():
        record[name] = {
            "ms_per_token": 1e3 * statistics.median(values),
            "lowest": 1e3 * min(values),
            "highest": 1e3 * max(values),
        }
        print("{:<14}{ms_per_token:8.3f} ms per token ({lowest:.3f} to {highest:.3f})".format(name, **record[name]))
    if "transformers" in record:
        record["times faster"] = record["transformers"]["ms_per_token"] / record["unpacked"]["ms_per_token"]
    return record


def transformers_run(model, prompt: list[int], count: int, record: dict):
    """Greedy decoding of the same weights by transformers, with its cache."""
    import torch
    import transformers

    from mimo_jax.oracle import build_twin, load_weights

    torch.set_grad_enabled(False)
    twin = build_twin(model.config)
    load_weights(twin, model.config, model.params)
    record |= {"torch": torch.__version__, "transformers": transformers.__version__}
    tokens = torch.tensor([prompt])
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return lambda: twin.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


def profile_command(args: argparse.Namespace) -> dict:
    import collections
    import gzip
    from pathlib import Path

    import jax

    from mimo_jax.generation import generate
    from mimo_jax.model import BUNDLED, load

    model = load(args.model or BUNDLED)
    generate(model, args.prompt, max_tokens=args.tokens)
    with jax.profiler.trace(args.trace):
        generate(model, args.prompt, max_tokens=args.tokens)
    (newest, *_) = sorted(Path(args.trace).rglob("*.trace.json.gz"), reverse=True)
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    total: collections.Counter = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            total[event["name"].split(".")[0]] += event["dur"]
    per_token = {name: micros / args.tokens for name, micros in total.most_common(20)}
    for name, micros in per_token.items():
        print(f"{micros:9.1f} us per token  {name}")
    return {"microseconds_per_token": per_token}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    decode = commands.add_parser("decode", help="ms per token at batch 1, beside transformers")
    decode.add_argument("--repeats", type=int, default=7)
    decode.add_argument("--no-transformers", action="store_true")
    decode.set_defaults(command=decode_command)
    profile = commands.add_parser("profile", help="time per token by operation")
    profile.add_argument("--trace", required=True, help="folder for the trace (open it in Perfetto)")
    profile.set_defaults(command=profile_command)
    for command in (decode, profile):
        command.add_argument("--model", help="checkpoint directory (default: the bundled model)")
        command.add_argument("--prompt", default="def binary_search(items, target):\n")
        command.add_argument("--tokens", type=int, default=128)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main_guard(lambda: print(json.dumps((args := parse(sys.argv[1:])).command(args))))
