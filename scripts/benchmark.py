"""Measures speed. Two things are always compared within one run: timings on shared machines are noisy.

scripts/benchmark.py decode                # ms per token of the bundled model beside transformers (needs torch)
scripts/benchmark.py speculation           # drafting against plain decoding on held-out prompts (needs a corpus)
scripts/benchmark.py slice --layers 2         # one device's share of the full model, random weights
scripts/benchmark.py profile --trace DIR   # where a decode step's time goes
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from mimo_jax.cli import add_drafter_options, main_guard, named_folders


def decode_command(args: argparse.Namespace) -> dict:
    import jax

    from mimo_jax.generation import generate
    from mimo_jax.model import BUNDLED, load

    model = load(args.model or BUNDLED, unpack=True, draft=False)
    packed = load(args.model or BUNDLED, unpack=False, draft=False)
    prompt = model.tokenizer.encode(args.prompt)
    runs = {
        "unpacked": lambda: generate(model, prompt, max_tokens=args.tokens),
        "packed": lambda: generate(packed, prompt, max_tokens=args.tokens),
    }
    record: dict = {"tokens": args.tokens, "repeats": args.repeats, "jax": jax.__version__}
    if not args.no_transformers:
        runs["transformers"] = transformers_run(args.model, prompt, args.tokens, record)
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


def transformers_run(directory: str | None, prompt: list[int], count: int, record: dict):
    """Greedy decoding of the same weights by transformers, with its cache."""
    from pathlib import Path

    import torch
    import transformers

    from mimo_jax.model import BUNDLED, load_dense
    from mimo_jax.oracle import build_twin, load_weights

    torch.set_grad_enabled(False)
    model = load_dense(Path(directory or BUNDLED))
    twin = build_twin(model.config)
    load_weights(twin, model.config, model.params)
    record |= {"torch": torch.__version__, "transformers": transformers.__version__}
    tokens = torch.tensor([prompt])
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return lambda: twin.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


def speculation_command(args: argparse.Namespace) -> dict:
    from pathlib import Path

    from mimo_jax.checkpoint.dflash import FOLDER
    from mimo_jax.generation import generate
    from mimo_jax.model import BUNDLED, load
    from mimo_jax.sampling import strategy_at
    from mimo_jax.training.acceptance import drafting_models, prompts_of
    from mimo_jax.training.corpus import load_tokens

    plain = load(args.model or BUNDLED, unpack=True, draft=False)
    # Looking n-grams up costs next to nothing, so a round of theirs is what verifying 8 tokens costs.
    drafters = named_folders(args.drafter or [f"DFlash={Path(args.model or BUNDLED) / FOLDER}"])
    models = drafting_models(plain, drafters, named_folders(args.chain))
    strategy = strategy_at(args.temperature)
    timings: dict[str, list] = {name: [] for name in models}
    for number, prompt in enumerate(prompts_of(load_tokens(Path(args.data), "heldout"), args.prompts + 1, 128)):
        for name, model in models.items():  # interleaved, so that a slow minute hits all of them
            result = generate(model, prompt, strategy, args.tokens, args.seed)
            if number:  # the first one compiles
                counted = result.acceptance
                timings[name].append((result.timing.decode_seconds, counted.tokens, counted.rounds))
    return speculation_record(timings, args)


def speculation_record(timings: dict[str, list], args: argparse.Namespace) -> dict:
    """Tokens per second, rounds in units of plain decoding's, and the speed-up with its 95 % interval over prompts."""
    import numpy as np

    record: dict = {"prompts": args.prompts, "tokens": args.tokens, "temperature": args.temperature}
    totals = {name: np.array(rows, float) for name, rows in timings.items()}
    plain = totals["plain"]
    one_token = plain[:, 0].sum() / plain[:, 2].sum()
    for name, rows in totals.items():
        seconds, tokens, rounds = rows.sum(axis=0)
        ratios = (rows[:, 1] / rows[:, 0]) / (plain[:, 1] / plain[:, 0])
        record[name] = {
            "tokens_per_second": tokens / seconds,
            "tokens_per_round": tokens / rounds,
            "round_over_one_token": seconds / rounds / one_token,
            "speedup": (tokens / seconds) / (plain[:, 1].sum() / plain[:, 0].sum()),
            "speedup_half_width": 1.96 * float(np.std(ratios, ddof=1)) / len(ratios) ** 0.5,
        }
        print(
            "{:<14}{tokens_per_second:8.0f} tokens/s, {tokens_per_round:5.2f} tokens per round; a round takes "
            "{round_over_one_token:.2f} plain steps; {speedup:.2f} (+- {speedup_half_width:.2f}) times plain".format(
                name, **record[name]
            )
        )
    return record


def slice_command(args: argparse.Namespace) -> dict:
    import jax

    from mimo_jax import decoding
    from mimo_jax.config import preset
    from mimo_jax.drafter_config import drafter_preset
    from mimo_jax.drafting import PLAIN, BlockDrafter
    from mimo_jax.planning import slice as one_share
    from mimo_jax.planning.forecast import BOUNDS, all_reduces
    from mimo_jax.planning.machines import GPUS
    from mimo_jax.planning.traffic import Plan, round_reads
    from mimo_jax.sharding import Layout
    from mimo_jax.tiles import tile_params

    whole = Plan(preset(args.preset), drafter_preset(args.preset), Layout(tensor=args.tp), cache_itemsize=2)
    config = one_share.share(whole.config, args.tp, args.layers)
    layers = len(config.layer_pattern)
    drafter = one_share.drafter_share(whole.drafter, args.tp, layers)
    plan = Plan(config, drafter, Layout(), cache_itemsize=2)
    on_gpu = jax.default_backend() == "gpu"
    config, params = tile_params(config, one_share.random_weights(config), consume=True)
    weights = decoding.Weights(params, one_share.random_drafter(drafter))
    reached = one_share.streaming_read((8 << 30) if on_gpu else (256 << 20), args.repeats)
    record: dict = {"device": jax.devices()[0].device_kind, "layers": layers, "tp": args.tp, "streaming_read": reached}
    record["rows"] = []
    drafters = {"T=1": PLAIN, "T=8": one_share.BlankDrafter(), "T=8 + drafter": BlockDrafter(drafter)}
    for context in args.context:
        for name, proposer in drafters.items():
            found = one_share.seconds_per_round(config, weights, proposer, context, args.rounds, args.repeats)
            seconds = statistics.median(found)
            read = sum(round_reads(plan, proposer.block_size, context, "drafter" in name).values())
            row = {
                "round": name,
                "context": context,
                "milliseconds": 1e3 * seconds,
                "lowest": 1e3 * min(found),
                "highest": 1e3 * max(found),
                "bytes": read,
                "of_datasheet": read / seconds / GPUS["h200"].bandwidth,
                "of_streaming_read": read / seconds / reached,
            }
            print(
                "{round:<14} at {context:>7}: {milliseconds:9.2f} ms ({lowest:.2f} to {highest:.2f}), "
                "{of_streaming_read:.1%} of a streaming read, {of_datasheet:.1%} of 4.8 TB/s".format_map(row)
            )
            if layers == len(whole.config.layer_pattern):
                sums = all_reduces(whole, "drafter" in name) * BOUNDS["low"].all_reduce
                accepted = 6.30 if "drafter" in name else 1.0
                row["projected_tokens_per_second"] = accepted / (seconds + sums)
            record["rows"].append(row)
    return record


def profile_command(args: argparse.Namespace) -> dict:
    import collections
    import gzip
    from pathlib import Path

    import jax

    from mimo_jax.generation import generate
    from mimo_jax.model import BUNDLED, load

    model = load(args.model or BUNDLED, draft=False)
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
    speculation = commands.add_parser("speculation", help="tokens per second with a drafter over plain decoding")
    speculation.add_argument("--data", default="runs/corpus", help="folder of the corpus")
    add_drafter_options(speculation)
    speculation.add_argument("--prompts", type=int, default=40, help="held-out prompts of 128 tokens")
    speculation.add_argument("--temperature", type=float, default=0.0)
    speculation.add_argument("--seed", type=int, default=0)
    speculation.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    speculation.add_argument("--tokens", type=int, default=48)
    speculation.set_defaults(command=speculation_command)
    share = commands.add_parser("slice", help="one device's share of a model that needs several: a round there")
    share.add_argument("--preset", default="mimo-v2.5-pro")
    share.add_argument("--tp", type=int, default=8, help="tensor-parallel devices of the whole")
    share.add_argument("--layers", type=int, help="only the first layers, for smaller devices")
    share.add_argument("--context", type=int, nargs="+", default=[1024, 262_144])
    share.add_argument("--rounds", type=int, default=20, help="per measurement")
    share.add_argument("--repeats", type=int, default=5)
    share.set_defaults(command=slice_command)
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
