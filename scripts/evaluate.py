"""Measures a trained model on held-out Python.

scripts/evaluate.py bits --model path/to/checkpoint            # bits per byte of a checkpoint
scripts/evaluate.py qat --run runs/qat                         # what MXFP4 costs, with and without QAT
scripts/evaluate.py rounding --model smol.gguf --calibrate docs # what MXFP4 costs any checkpoint
scripts/evaluate.py acceptance --model path/to/checkpoint      # what the target accepts of its drafter's blocks
scripts/evaluate.py domains --plot domains.png                 # the same by domain: code, prose, chat and others
scripts/evaluate.py llama.cpp --llama runs/llama.cpp            # the same drafter there: texts, tokens per round
scripts/evaluate.py reading --model path/to/checkpoint         # characters that it reads right in pictures, by font
scripts/evaluate.py paths                                      # functions that compile: best of 8 against one
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import (
    Parser,
    add_confidence_option,
    add_draft_options,
    add_drafter_options,
    draft_options,
    named_folders,
)
from mimo_jax.cli.plots import need_matplotlib
from mimo_jax.cli.values import HOTTEST, folder, output_file, output_folder, real, whole
from mimo_jax.errors import UserError
from mimo_jax.files import write_atomically


def bits_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation.bits import bits_per_byte, heldout_of
    from mimo_jax.loading import BUNDLED, load

    directory = Path(args.model or BUNDLED)
    heldout = heldout_of(Path(args.data), directory)
    model = load(directory, layout="dense", draft="none")
    found = bits_per_byte(model.params, model.config, *heldout, windows=args.windows)
    print(f"{found.bits_per_byte:.4f} bits per byte (+- {found.error:.4f})", file=sys.stderr)
    return dataclasses.asdict(found)


def qat_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation.bits import compare_qat

    record = compare_qat(Path(args.run), Path(args.data), args.windows)
    best = record["BF16"]["bits_per_byte"]
    for name, row in record.items():
        if isinstance(row, dict):
            value = row["bits_per_byte"]
            print(f"{name:<32}{value:8.4f}  {100 * (value / best - 1):+6.2f} %", file=sys.stderr)
    print(f"rounding loss recovered {record['rounding loss recovered, percent']:18.0f} %", file=sys.stderr)
    return record


def rounding_command(args: argparse.Namespace) -> dict:
    from mimo_jax.calibration.texts import read_texts
    from mimo_jax.evaluation import rounding

    texts = {name: read_texts(path) for name, path in named_folders(args.text).items()} or rounding.usual_texts()
    record = rounding.compare(args.model, args.calibrate, args.calibration_windows, texts, args.windows)
    increases = rounding.increases(record)
    for name, above in increases.items():
        for text, (mean, half) in above.items():
            row = record["arms"][name][text]
            bits = f"{row['bits_per_byte']:.4f} bits per byte ({mean:+.2f} +- {half:.2f} %), KL {row['kl']:.4f}"
            print(f"{name:<24}{text:<10}{bits}", file=sys.stderr)
    return {"model": args.model.name, "above_exact_percent": increases, **record}


def acceptance_command(args: argparse.Namespace) -> dict:
    from mimo_jax.checkpoint.dflash import FOLDER
    from mimo_jax.evaluation import acceptance
    from mimo_jax.evaluation.bits import heldout_of
    from mimo_jax.loading import BUNDLED, load

    if args.plot:
        need_matplotlib()
        if args.plot == args.out:
            raise UserError(f"--plot and --out both name {args.out}; they are two files")
    directory = Path(args.model or BUNDLED)
    tokens, _ = heldout_of(Path(args.data), directory)
    # The modules: native code has no chains and no MTP layers, and all are to be measured in one arithmetic.
    plain = dataclasses.replace(load(directory, layout="dense", draft="none"), rule=args.rule)
    drafters = named_folders(args.drafter or [f"DFlash={directory / FOLDER}"])
    models = acceptance.drafting_models(plain, drafters, named_folders(args.chain))
    prompts = acceptance.prompts_of(tokens, args.prompts, args.prompt_tokens)
    record: dict = {"prompts": len(prompts), "max_tokens": args.tokens, "rule": args.rule, "rows": [], "target": []}
    print(f"{'drafter':<20}{'T':>5}  {'tokens per round':<24}conditional acceptance by position", file=sys.stderr)
    for found in acceptance.study(plain, models, prompts, args.temperature, args.tokens, args.rows):
        if "drafter" in found:
            record["rows"] += _rows(found)
        else:
            record["target"].append(found)
            print(
                "{:<20}{temperature:>5}  {nats_per_token:.2f} nats per token; order-blind bound "
                "{order_blind_bound:.2f}".format("target", **found),
                file=sys.stderr,
            )
    if args.plot:
        acceptance.plot(record["rows"], args.plot)
    return record


def _rows(found: dict) -> list[dict]:
    """Prints what a drafter got accepted, over all texts and over those that are no loops, and returns it."""
    texts, subsets = found.pop("texts"), found.pop("subsets")
    for row in subsets:
        by_position = " ".join(f"{value:.2f}" for value in row["conditional"])
        figure = "{tokens_per_round:.2f} +- {half_width:.2f} ({subset})".format(**row)
        print(f"{found['drafter']:<20}{found['temperature']:>5}  {figure:<24}{by_position}", file=sys.stderr)
    if not found["temperature"]:
        print(f"{'':<27}{found['same_as_plain']} of {texts} texts as without a drafter", file=sys.stderr)
    return [found | row for row in subsets]


def domains_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation import domains
    from mimo_jax.loading import BUNDLED, find, load

    if args.plot:
        need_matplotlib()
    directory = find(args.model or BUNDLED)
    model = load(directory, layout="dense", **draft_options(args))
    prompts = domains.read_domains(args.prompts or domains.PROMPTS, model, directory)
    rows = []
    print(
        f"{'domain':<12}{'T':>5}{'nats':>7}  {'tokens per round':<18}conditional acceptance by position",
        file=sys.stderr,
    )
    for row in domains.study(model, prompts, args.temperature, args.tokens):
        figures = "{domain:<12}{temperature:>5}{nats_per_token:7.2f}  ".format(**row)
        figures += f"{'{tokens_per_round:.2f} +- {half_width:.2f}'.format(**row):<18}"
        print(figures + " ".join(f"{value:.2f}" for value in row["conditional"]), file=sys.stderr)
        rows.append(row)
    if args.plot:
        domains.plot(rows, args.plot)
    return {"model": directory.name, **draft_options(args), "max_tokens": args.tokens, "rows": rows}


def reading_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation import reading
    from mimo_jax.evaluation.bits import heldout_of
    from mimo_jax.loading import BUNDLED, load

    directory = Path(args.model or BUNDLED)
    tokens, _ = heldout_of(Path(args.data), directory)
    told = reading.transcribe(load(directory, draft="none"), tokens, args.pictures, args.fonts, args.size, args.seed)
    rows = list(reading.by_font(told))
    for row in rows:
        figures = "{accuracy:7.2%} +- {interval:.2%}  {exact} of {pictures} whole".format(**row)
        print(f"{row['font']:<28}{figures}{'  (never seen in training)' * row['held_out']}", file=sys.stderr)
    samples = [dataclasses.asdict(one) for one in told[:: args.pictures]]
    return {"model": directory.name, "size": args.size, "seed": args.seed, "rows": rows, "samples": samples}


def llama_cpp_command(args: argparse.Namespace) -> dict:
    from mimo_jax.evaluation import acceptance, llama_cpp_drafting
    from mimo_jax.evaluation.bits import heldout_of
    from mimo_jax.loading import BUNDLED

    directory = Path(args.model or BUNDLED)
    tokens, _ = heldout_of(Path(args.data), directory)
    prompts = acceptance.prompts_of(tokens, args.prompts, args.prompt_tokens)
    found = llama_cpp_drafting.compare(directory, args.llama, prompts, args.tokens)
    command = "scripts/evaluate.py llama.cpp --prompts {prompts} --prompt-tokens {prompt_tokens} --tokens {tokens}"
    found = {"command": command.format(**vars(args)), **found}
    print(f"here, float32: {found['here']['tokens_per_round']:.3f} tokens per round", file=sys.stderr)
    for experts, row in found["llama.cpp"].items():
        texts = f"{row['same_texts']} of {len(prompts)} texts the same, {row['same_rounds']} in as many rounds"
        print(f"llama.cpp, {experts} experts: {row['tokens_per_round']:.3f} tokens per round, {texts}", file=sys.stderr)
    return found


def paths_command(args: argparse.Namespace) -> dict:
    from mimo_jax.decode.sampling import strategy_at
    from mimo_jax.evaluation.bits import heldout_of
    from mimo_jax.evaluation.paths import compiled, functions_of
    from mimo_jax.loading import BUNDLED, load

    directory = Path(args.model or BUNDLED)
    tokens, _ = heldout_of(Path(args.data), directory)
    model = load(directory, **draft_options(args))
    functions = functions_of(tokens, model.tokenizer, args.prompts)
    found = compiled(model, functions, args.n, strategy_at(args.temperature), args.tokens)
    for name, row in found.items():
        low, high = row["interval"]
        print(
            f"{name:<14}{100 * row['rate']:6.1f} % compile ({100 * low:.1f} to {100 * high:.1f}), "
            f"{1e3 * row['seconds']['median']:5.0f} ms, {row['times one']['median']:.2f} times one",
            file=sys.stderr,
        )
    about = {"functions": len(functions), "temperature": args.temperature, "max_tokens": args.tokens}
    return about | {"drafter": model.drafter.block_size > 1, **found}


def parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    bits = commands.add_parser("bits", help="held-out bits per byte of a checkpoint")
    bits.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    bits.set_defaults(command=bits_command)
    qat = commands.add_parser("qat", help="BF16 against MXFP4 rounded and MXFP4 trained, same tokens, same budget")
    qat.add_argument("--run", required=True, help="run annealed with --qat")
    qat.set_defaults(command=qat_command)
    rounding = commands.add_parser("rounding", help="what MXFP4 costs a checkpoint, rounded plainly and calibrated")
    rounding.add_argument("--model", type=Path, required=True, help="checkpoint directory or GGUF file, not in MXFP4")
    rounding.add_argument("--calibrate", type=Path, required=True, help="text file, or folder of them, to calibrate on")
    rounding.add_argument("--calibration-windows", type=whole(8), default=32, help="of 512 tokens, at most")
    rounding.add_argument(
        "--text",
        action="append",
        default=[],
        help="[NAME=]file to measure on; repeat it (default: Python's own)",
    )
    rounding.add_argument("--windows", type=whole(2), default=16, help="of 512 tokens, of each text")
    rounding.set_defaults(command=rounding_command)
    acceptance = commands.add_parser("acceptance", help="tokens per round of drafters, on held-out prompts")
    acceptance.add_argument("--model", help="checkpoint directory of the target (default: the bundled model)")
    add_drafter_options(acceptance)
    acceptance.add_argument(
        "--rule", choices=("block", "token"), default="block", help="how sampled drafts are verified"
    )
    acceptance.add_argument("--plot", type=output_file, help="PNG file to write")
    acceptance.add_argument("--prompts", type=whole(2), default=200, help="held-out prompts")
    acceptance.add_argument("--prompt-tokens", type=whole(1), default=128)
    acceptance.add_argument(
        "--tokens", type=whole(1), default=48, help="to generate after each prompt (small models loop if it is many)"
    )
    acceptance.add_argument("--rows", type=whole(1), default=40, help="prompts per batch")
    acceptance.add_argument("--temperature", type=real(0, HOTTEST), nargs="+", default=[0.0, 0.7, 1.0])
    acceptance.set_defaults(command=acceptance_command)
    domains = commands.add_parser("domains", help="tokens per round by domain, with the target's entropy there")
    domains.add_argument("--model", help="checkpoint directory, or smollm2 (default: the bundled model)")
    domains.add_argument("--draft", choices=("dflash", "mtp", "lookup"), default="dflash", help="what drafts")
    add_confidence_option(domains)
    domains.add_argument("--prompts", type=Path, help="TOML file of them (default: mimo_jax/evaluation/domains.toml)")
    domains.add_argument("--tokens", type=whole(1), default=48, help="to generate after each prompt")
    domains.add_argument("--temperature", type=real(0, HOTTEST), nargs="+", default=[0.0, 1.0])
    domains.add_argument("--plot", type=output_file, help="PNG file to write")
    domains.set_defaults(command=domains_command)
    beside = commands.add_parser("llama.cpp", help="the published part of the drafter, here and in llama.cpp")
    beside.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    beside.add_argument("--llama", type=output_folder, default="runs/llama.cpp", help="folder to build llama.cpp in")
    beside.add_argument("--prompts", type=whole(2), default=200, help="held-out prompts")
    beside.add_argument("--prompt-tokens", type=whole(1), default=128)
    beside.add_argument("--tokens", type=whole(2), default=48, help="to generate after each prompt")
    beside.set_defaults(command=llama_cpp_command)
    paths = commands.add_parser("paths", help="held-out functions that compile: the best of many samples against one")
    paths.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    add_draft_options(paths)
    paths.add_argument("--n", type=whole(1, 64), default=8, help="samples of each function")
    paths.add_argument("--prompts", type=whole(2), default=300, help="held-out functions")
    paths.add_argument("--tokens", type=whole(1), default=128, help="of a body, at most")
    paths.add_argument("--temperature", type=real(0, HOTTEST), default=0.7)
    paths.set_defaults(command=paths_command)
    reading = commands.add_parser("reading", help="characters read right in pictures of held-out code, by font")
    reading.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    reading.add_argument("--pictures", type=whole(2, 10_000), default=50, help="of each font")
    reading.add_argument("--size", type=whole(6, 64), help="of the font, pixels to the em (default: 11 to 19)")
    reading.add_argument("--fonts", type=folder, help="folder that `make fonts` installed them into")
    reading.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    reading.set_defaults(command=reading_command)
    for command in (bits, qat):
        command.add_argument("--windows", type=whole(2), default=400, help="held-out windows of 512 tokens")
    for command in (bits, qat, acceptance, beside, reading, paths):
        command.add_argument("--data", default="runs/corpus", help="folder of the corpus")
    for command in (bits, qat, rounding, acceptance, domains, beside, reading, paths):
        command.add_argument("--out", type=output_file, help="also write the result to this JSON file")
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    record = args.command(args)
    if args.out:
        write_atomically(args.out, (json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(record))


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
