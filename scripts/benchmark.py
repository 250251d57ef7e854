"""Measures speed. Two things are always compared within one run: timings on shared machines are noisy.

scripts/benchmark.py decode                # ms per token of the bundled model beside transformers (needs torch)
scripts/benchmark.py decode --beside llama.cpp --llama runs/llama.cpp    # plain, blocks, prefill; builds it there
scripts/benchmark.py random --out DIR      # a checkpoint of 105 M random weights for it (--model DIR)
scripts/benchmark.py step                  # the native step: batches, block sizes, and how near to the memory's speed
scripts/benchmark.py speculation           # drafting against plain decoding on held-out prompts (needs a corpus)
scripts/benchmark.py draft                 # which drafter pays on this machine, by kind of text: measured advice
scripts/benchmark.py paths                 # 1, 4, 8 and 16 paths, and a tree of them, beside one (needs a corpus)
scripts/benchmark.py serve                 # how long a server's clients wait, at the engine and through HTTP
scripts/benchmark.py slice --layers 2         # one device's share of the full model, random weights
scripts/benchmark.py round                    # the same by the persistent kernel, and each kind of its rows (Hopper)
scripts/benchmark.py soak                     # 10,000 rounds of it, each compared with the first
scripts/benchmark.py streaming             # a streamed text beside one made in one visit
scripts/benchmark.py profile --trace DIR   # where a decode step's time goes
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import (
    Parser,
    add_draft_options,
    add_drafter_options,
    draft_options,
    named_folders,
    need_packages,
)
from mimo_jax.cli.values import HOTTEST, SEED, new_folder, output_folder, real, whole

SPECULATION_ROW = (
    "{:<14}{tokens_per_second:8.0f} tokens/s, {tokens_per_round:5.2f} tokens per round; a round takes "
    "{round_over_one_token:.2f} plain steps; {speedup:.2f} (+- {speedup_half_width:.2f}) times plain"
)


def decode_command(args: argparse.Namespace) -> dict:
    directory = Path(args.model) if args.model else None
    return _beside_llama_cpp(directory, args) if args.beside == "llama.cpp" else _beside_transformers(directory, args)


def _beside_llama_cpp(directory: Path | None, args: argparse.Namespace) -> dict:
    import jax

    from mimo_jax.evaluation import native_speed
    from mimo_jax.loading import BUNDLED

    found = native_speed.beside_llama_cpp(directory or BUNDLED, args.llama, args.repeats, args.threads, args.gguf)
    for name, row in found.items():
        print(
            f"{name:<16}{row['ours']['median']:9.0f} tokens/s, llama.cpp {row['llama.cpp']['median']:7.0f}; ratio "
            "{median:.2f} ({lowest:.2f} to {highest:.2f})".format(**row["ratio"])
        )
    return {"rounds": args.repeats, "threads": args.threads, "jax": jax.__version__, **found}


def _beside_transformers(directory: Path | None, args: argparse.Namespace) -> dict:
    with_transformers = args.beside == "transformers"
    if with_transformers:
        need_packages("transformers (--beside nothing leaves it out)", "references", "torch", "transformers")
    import jax

    from mimo_jax.evaluation import speed
    from mimo_jax.loading import BUNDLED

    runs = speed.decode_runs(directory or BUNDLED, args.prompt, args.tokens, with_transformers)
    found = speed.interleaved(runs, args.repeats, args.tokens)
    for name, row in found.items():
        print("{:<14}{ms_per_token:8.3f} ms per token ({lowest:.3f} to {highest:.3f})".format(name, **row))
    record: dict = {"tokens": args.tokens, "repeats": args.repeats, "jax": jax.__version__, **found}
    if with_transformers:
        import torch
        import transformers

        record |= {"torch": torch.__version__, "transformers_version": transformers.__version__}
        record["times faster"] = found["transformers"]["ms_per_token"] / found["native"]["ms_per_token"]
    return record


def step_command(args: argparse.Namespace) -> dict:
    from mimo_jax.checkpoint.dflash import has_drafter
    from mimo_jax.evaluation import native_speed
    from mimo_jax.evaluation.acceptance import prompts_of
    from mimo_jax.loading import BUNDLED, load
    from mimo_jax.training.corpus import load_tokens

    directory = Path(args.model or BUNDLED)
    drafts = has_drafter(directory)
    prompts = prompts_of(load_tokens(Path(args.data), "heldout"), args.prompts, 128) if drafts else []
    plain = load(directory, draft="none")
    record: dict = {"batch": {}}
    for batch in (1, 4, 16):
        rate = native_speed.spread_of(lambda batch=batch: native_speed.plain_rate(plain, batch), args.repeats)
        record["batch"][str(batch)] = rate
        print("batch {:<3}{median:9.0f} tokens/s ({lowest:.0f} to {highest:.0f})".format(batch, **rate))
    for what, rates in (("strategies", native_speed.strategy_rates), ("paths", native_speed.path_rates)):
        record[what] = rates(plain, args.repeats)
        for name, row in record[what].items():
            print(name + ": {median:.0f} tokens/s ({lowest:.0f} to {highest:.0f})".format(**row))
    size = native_speed.active_bytes(directory)
    record["roofline"] = found = native_speed.roofline(plain, size, args.repeats)
    print(
        "one token reads {:.1f} MB: {:.1f} GB/s, {:.2f} of a streaming read".format(
            size / 1e6, found["step, GB/s"]["median"], found["fraction"]["median"]
        )
    )
    if not drafts:
        return record
    drafting = load(directory, draft="dflash")
    record["blocks"] = native_speed.block_costs(plain, drafting, prompts, args.tokens, args.repeats)
    for size, row in record["blocks"].items():
        print(
            f"block of {size}: {row['tokens per round']:.2f} tokens per round; verifying takes "
            f"{row['verifying, plain steps']:.2f} plain steps, a round {row['round, plain steps']:.2f}; "
            "{median:.2f} times plain ({lowest:.2f} to {highest:.2f})".format(**row["times plain"])
        )
    return record


def random_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation.random_checkpoint import write_random

    write_random(args.out, seed=args.seed, router_bias=args.router_bias)
    return {"checkpoint": str(args.out), "seed": args.seed, "router_bias": args.router_bias}


def speculation_command(args: argparse.Namespace) -> dict:
    from mimo_jax.checkpoint.dflash import FOLDER
    from mimo_jax.decode.sampling import strategy_at
    from mimo_jax.evaluation.acceptance import drafting_models, prompts_of
    from mimo_jax.evaluation.speed import speculation
    from mimo_jax.loading import BUNDLED, load
    from mimo_jax.training.corpus import load_tokens

    directory = Path(args.model or BUNDLED)
    # Looking text up costs next to nothing, so a round of prompt lookup is what verifying 8 tokens costs.
    drafters = named_folders(args.drafter or [f"DFlash={directory / FOLDER}"])
    models = drafting_models(load(directory, draft="none"), drafters, named_folders(args.chain))
    prompts = prompts_of(load_tokens(Path(args.data), "heldout"), args.prompts + 1, 128)
    found = speculation(models, prompts, strategy_at(args.temperature), max_tokens=args.tokens, seed=args.seed)
    for name, row in found.items():
        print(SPECULATION_ROW.format(name, **row))
    return {"prompts": args.prompts, "tokens": args.tokens, "temperature": args.temperature, **found}


def draft_command(args: argparse.Namespace) -> dict:
    import jax

    from mimo_jax.decode.sampling import Greedy
    from mimo_jax.evaluation import drafts
    from mimo_jax.loading import BUNDLED, find

    models = drafts.models_of(find(args.model or BUNDLED))
    plain = models["plain"]
    kinds = drafts.kinds_of_prompts(plain.tokenizer, args.text or drafts.OWN_TEXTS, args.prompts + 1)
    strategies = {"greedy": Greedy(), "as the model says": plain.strategy}
    record = drafts.compare(models, kinds, strategies, args.tokens)
    for about, rows in record.items():
        print(about)
        for name in models:
            print(SPECULATION_ROW.format(name, **rows[name]))
    for about, rows in record.items():
        print(f"{about}: --draft {rows['advice']}")
    return {"prompts": args.prompts, "tokens": args.tokens, "device": jax.devices()[0].device_kind, **record}


def paths_command(args: argparse.Namespace) -> dict:
    from mimo_jax.checkpoint.dflash import has_drafter
    from mimo_jax.evaluation.acceptance import prompts_of
    from mimo_jax.evaluation.paths import PROMPT_TOKENS, path_seconds
    from mimo_jax.loading import BUNDLED, load
    from mimo_jax.training.corpus import load_tokens

    directory = Path(args.model or BUNDLED)
    prompts = prompts_of(load_tokens(Path(args.data), "heldout"), args.repeats + 1, PROMPT_TOKENS)
    record: dict = {"repeats": args.repeats, "tokens": args.tokens}
    for name, draft in (("plain", "none"), ("drafted", "dflash"))[: 1 + has_drafter(directory)]:
        record[name] = path_seconds(load(directory, draft=draft), prompts, args.tokens)
        for paths, row in record[name].items():
            times = "{median:6.2f} times one ({lowest:.2f} to {highest:.2f})".format(**row["times one"])
            print(f"{name:<8} {paths:<17}{1e3 * row['seconds']['median']:7.0f} ms, {times}")
    return record


def serve_command(args: argparse.Namespace) -> dict:
    need_packages("serving", "serve", "jinja2", "llguidance", "starlette", "uvicorn")
    from mimo_jax.evaluation.serving import PROMPTS, measure
    from mimo_jax.loading import BUNDLED, find

    record: dict = {"tokens": args.tokens, "prompts": PROMPTS, "rounds": args.rounds}
    for slots in args.slots:
        record[f"{slots} slots"] = found = measure(
            find(args.model or BUNDLED), slots, args.clients, args.tokens, args.rounds
        )
        for load, ways in found.items():
            for way, row in ways.items():
                first, between = (
                    "{:.1f} / {:.1f} ms".format(*(row[f"{what}, {of}, ms"]["median"] for of in ("p50", "p99")))
                    for what in ("first token", "between tokens")
                )
                rates = "{:.1f} requests/s, {:.0f} tokens/s".format(
                    *(row[f"{what} per second"]["median"] for what in ("requests", "tokens"))
                )
                print(f"{slots} slots, {load:<19}{way:<7}first token {first}, between tokens {between}; {rates}")
    return record


def streaming_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation.speed import streaming
    from mimo_jax.loading import BUNDLED, load

    model = load(args.model or BUNDLED, **draft_options(args))
    found = streaming(model, args.prompt, args.lengths, args.repeats)
    for length, row in found.items():
        print("{:>5} tokens: {ratio:.3f} times one visit ({lowest:.3f} to {highest:.3f})".format(length, **row))
    return {"repeats": args.repeats, "lengths": found}


def slice_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation.slice import measure

    measured = measure(args.preset, args.tp, args.layers, args.context, args.rounds, args.repeats)
    return _printed(measured, "{round:<14} at {context:>7}: {milliseconds:9.2f} ms ({lowest:.2f} to {highest:.2f})")


def round_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation.persistent_speed import measure

    measured = measure(args.preset, args.tp, args.layers, args.tokens, args.context, args.rounds, args.repeats)
    return _printed(measured, "{tokens} tokens at {context:>7}: {milliseconds:7.3f} ms ({lowest:.3f} to {highest:.3f})")


def _printed(measured: Iterator[dict], line: str) -> dict:
    """What was measured on, and all rounds, each printed when it is there."""
    about, rows = next(measured), []
    share = ", {of_streaming_read:.1%} of a streaming read, {of_datasheet:.1%} of an H200's bandwidth"
    for row in measured:
        rows.append(row)
        print((line + share).format_map(row), flush=True)
        for kind, spent in row.get("kinds", {}).items():
            print("  {:<16}{rows:>4} rows {us:9.1f} us, each {us_each:6.2f}".format(kind, **spent), flush=True)
    return {**about, "rows": rows}


def soak_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation.persistent_speed import soak

    found = soak(args.rounds)
    print("{rounds} rounds on {device}, {with_other_bits} of them with other bits than the first".format(**found))
    return found


def profile_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation.speed import profile
    from mimo_jax.loading import BUNDLED, load

    model = load(args.model or BUNDLED, draft="none")
    found = profile(model, args.prompt, args.tokens, args.trace)
    for name, micros in found.items():
        print(f"{micros:9.1f} us per token  {name}")
    return {"microseconds_per_token": found}


def parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    decode = commands.add_parser("decode", help="ms per token at batch 1, beside transformers")
    decode.add_argument("--repeats", type=whole(1), default=7)
    decode.add_argument("--beside", choices=("transformers", "llama.cpp", "nothing"), default="transformers")
    decode.add_argument("--llama", type=output_folder, default="runs/llama.cpp", help="folder to build llama.cpp in")
    decode.add_argument("--gguf", type=Path, help="for llama.cpp, of a model that was converted from it")
    decode.add_argument("--threads", type=whole(1), default=2, help="of llama.cpp; this program uses all cores")
    decode.set_defaults(command=decode_command)
    speculation = commands.add_parser("speculation", help="tokens per second with a drafter over plain decoding")
    speculation.add_argument("--data", default="runs/corpus", help="folder of the corpus")
    add_drafter_options(speculation)
    speculation.add_argument("--prompts", type=whole(2), default=40, help="held-out prompts of 128 tokens")
    speculation.add_argument("--temperature", type=real(0, HOTTEST), default=0.0)
    speculation.add_argument("--seed", type=whole(0, SEED), default=0)
    speculation.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    speculation.add_argument("--tokens", type=whole(1), default=48)
    speculation.set_defaults(command=speculation_command)
    draft = commands.add_parser("draft", help="which drafter pays on this machine, by kind of text: measured advice")
    draft.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    draft.add_argument(
        "--text",
        type=Path,
        action="append",
        help="file to take prompts from; repeat it (default: some of ours)",
    )
    draft.add_argument("--prompts", type=whole(2), default=40, help="of each kind")
    draft.add_argument("--tokens", type=whole(1), default=96)
    draft.set_defaults(command=draft_command)
    share = commands.add_parser("slice", help="one device's share of a model that needs several: a round there")
    share.add_argument("--context", type=whole(1), nargs="+", default=[1024, 262_144])
    share.set_defaults(command=slice_command)
    step_round = commands.add_parser("round", help="the persistent kernel on one device's share: a round, and its rows")
    step_round.add_argument("--tokens", type=whole(1, 8), nargs="+", default=[8, 1])
    step_round.add_argument("--context", type=whole(9), nargs="+", default=[1024, 131_072])
    step_round.set_defaults(command=round_command)
    for command in (share, step_round):
        command.add_argument("--preset", default="mimo-v2.5-pro")
        command.add_argument("--tp", type=whole(1), default=8, help="tensor-parallel devices of the whole")
        command.add_argument("--layers", type=whole(1), help="only the first layers, for smaller devices")
        command.add_argument("--rounds", type=whole(1), default=20, help="per measurement")
        command.add_argument("--repeats", type=whole(1), default=5)
    soak = commands.add_parser("soak", help="the persistent kernel again and again: does any round give other bits?")
    soak.add_argument("--rounds", type=whole(1), default=10_000)
    soak.set_defaults(command=soak_command)
    random = commands.add_parser("random", help="writes a checkpoint of 105 M random weights, larger than the bundled")
    random.add_argument("--out", type=new_folder, required=True, help="folder of the checkpoint, which must not exist")
    random.add_argument("--seed", type=whole(0, SEED), default=0)
    random.add_argument("--router-bias", type=real(0, 1000), default=60.0, help="0: routing depends on the token")
    random.set_defaults(command=random_command)
    step = commands.add_parser("step", help="the native step: batches, block sizes, share of the memory's speed")
    step.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    step.add_argument("--data", default="runs/corpus", help="folder of the corpus")
    step.add_argument("--prompts", type=whole(1), default=40, help="held-out prompts of 128 tokens")
    step.add_argument("--tokens", type=whole(1), default=48)
    step.add_argument("--repeats", type=whole(1), default=5)
    step.set_defaults(command=step_command)
    paths = commands.add_parser("paths", help="many samples of one prompt, and a tree of them, beside one sample")
    paths.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    paths.add_argument("--data", default="runs/corpus", help="folder of the corpus")
    paths.add_argument("--tokens", type=whole(1), default=64, help="of each path")
    paths.add_argument("--repeats", type=whole(1), default=9, help="rounds, each with a held-out prompt of 128 tokens")
    paths.set_defaults(command=paths_command)
    serve = commands.add_parser(
        "serve", help="how long clients wait for tokens (p50 / p99), and what is served per second"
    )
    serve.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    serve.add_argument("--slots", type=whole(1, 64), nargs="+", default=[4, 16])
    serve.add_argument("--clients", type=whole(1, 64), nargs="+", default=[1, 4, 16])
    serve.add_argument("--tokens", type=whole(2, 256), default=64, help="of each reply")
    serve.add_argument("--rounds", type=whole(1), default=5)
    serve.set_defaults(command=serve_command)
    streaming = commands.add_parser("streaming", help="what streaming a text costs over making it in one visit")
    streaming.add_argument("--lengths", type=whole(1), nargs="+", default=[32, 128, 512], help="tokens to generate")
    streaming.add_argument("--repeats", type=whole(1), default=15)
    add_draft_options(streaming)
    streaming.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    streaming.add_argument("--prompt", default="def binary_search(items, target):\n")
    streaming.set_defaults(command=streaming_command)
    profile = commands.add_parser("profile", help="time per token by operation")
    profile.add_argument(
        "--trace", type=output_folder, required=True, help="folder for the trace (open it in Perfetto)"
    )
    profile.set_defaults(command=profile_command)
    for command in (decode, profile):
        command.add_argument("--model", help="checkpoint directory (default: the bundled model)")
        command.add_argument("--prompt", default="def binary_search(items, target):\n")
        command.add_argument("--tokens", type=whole(1), default=128)
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    print(json.dumps(args.command(args)))


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
