"""Measures a trained model on held-out Python.

scripts/evaluate.py bits --model path/to/checkpoint            # bits per byte of a checkpoint
scripts/evaluate.py qat --run runs/qat                         # what MXFP4 costs, with and without QAT
scripts/evaluate.py acceptance --model path/to/checkpoint      # what the target accepts of its drafter's blocks
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from mimo_jax.cli import add_drafter_options, main_guard, named_folders, need_matplotlib
from mimo_jax.errors import UserError
from mimo_jax.files import write_atomically


def _heldout(args: argparse.Namespace):
    import numpy as np

    from mimo_jax.tokenizer import Tokenizer
    from mimo_jax.training.corpus import load_tokens

    data = Path(args.data)
    return load_tokens(data, "heldout"), np.array(Tokenizer.load(data / "tokenizer.json").byte_lengths())


def bits_command(args: argparse.Namespace) -> dict:
    from mimo_jax.model import BUNDLED, load
    from mimo_jax.training.evaluation import bits_per_byte

    model = load(args.model or BUNDLED, unpack=True)
    found = bits_per_byte(model.params, model.config, *_heldout(args), windows=args.windows)
    print(f"{found.bits_per_byte:.4f} bits per byte (+- {found.error:.4f})", file=sys.stderr)
    return dataclasses.asdict(found)


def qat_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training import run
    from mimo_jax.training.evaluation import as_bf16, as_mxfp4, bits_per_byte
    from mimo_jax.training.qat import QatState

    config, train = run.read_settings(Path(args.run))
    state = run.latest_state(Path(args.run), config, train)
    if not isinstance(state, QatState):
        raise UserError(f"--run {args.run} was trained without QAT; expected a run of `train.py anneal --qat`")
    rows = {
        "BF16": as_bf16(state.masters.params),
        "MXFP4, rounded after training": as_mxfp4(state.masters.params),
        "MXFP4, after QAT": as_mxfp4(state.params),
    }
    heldout, record = _heldout(args), {}
    for name, params in rows.items():
        found = bits_per_byte(params, config, *heldout, windows=args.windows)
        record[name] = {**dataclasses.asdict(found), "step": int(state.step)}
    best, rounded, trained = (record[name]["bits_per_byte"] for name in rows)
    record["QAT above BF16, percent"] = 100 * (trained / best - 1)
    record["rounding loss recovered, percent"] = 100 * (rounded - trained) / (rounded - best)
    for name in rows:
        value = record[name]["bits_per_byte"]
        print(f"{name:<32}{value:8.4f}  {100 * (value / best - 1):+6.2f} %", file=sys.stderr)
    print(f"rounding loss recovered {record['rounding loss recovered, percent']:18.0f} %", file=sys.stderr)
    return record


def acceptance_command(args: argparse.Namespace) -> dict:
    from mimo_jax.checkpoint.dflash import FOLDER
    from mimo_jax.model import BUNDLED, load
    from mimo_jax.sampling import strategy_at
    from mimo_jax.training import acceptance

    if args.plot:
        need_matplotlib()
    plain = dataclasses.replace(load(args.model or BUNDLED, unpack=True, draft=False), rule=args.rule)
    drafters = named_folders(args.drafter or [f"DFlash={Path(args.model or BUNDLED) / FOLDER}"])
    prompts = acceptance.prompts_of(_heldout(args)[0], args.prompts, args.prompt_tokens)
    record: dict = {"prompts": len(prompts), "max_tokens": args.tokens, "rule": args.rule, "rows": [], "target": []}
    print(f"{'drafter':<20}{'T':>5}  {'tokens per round':<24}conditional acceptance per slot", file=sys.stderr)
    for temperature in args.temperature:
        strategy, expected = strategy_at(temperature), []
        for name, model in acceptance.drafting_models(plain, drafters, named_folders(args.chain)).items():
            label = f"{name} T={temperature}"
            results = acceptance.continue_all(model, prompts, strategy, args.tokens, args.rows, label)
            expected = expected or results
            same = sum(one.tokens == other.tokens for one, other in zip(expected, results))
            about = {"drafter": name, "temperature": temperature, "same_as_plain": same}
            record["rows"] += _report(about, results)
        if temperature:
            record["target"].append({"temperature": temperature} | _uncertainty(plain, prompts, strategy, expected))
    if args.plot:
        acceptance.plot(record["rows"], Path(args.plot))
    return record


def _report(about: dict, results: list) -> list[dict]:
    """Prints what a drafter got accepted, over all texts and over those that are no loops, and returns it."""
    from mimo_jax.training.acceptance import summaries

    rows = [about | row for row in summaries(results)]
    for row in rows:
        slots = " ".join(f"{value:.2f}" for value in row["conditional"])
        figure = "{tokens_per_round:.2f} +- {half_width:.2f} ({subset})".format(**row)
        print(f"{row['drafter']:<20}{row['temperature']:>5}  {figure:<24}{slots}", file=sys.stderr)
    if not about["temperature"]:
        print(f"{'':<27}{about['same_as_plain']} of {len(results)} texts as without a drafter", file=sys.stderr)
    return rows


def _uncertainty(model, prompts: list, strategy, results: list) -> dict:
    """The target's entropy on what it said, and what that leaves to drafters whose slots are blind to each other."""
    from mimo_jax.training import ceiling

    entropy = ceiling.entropy_per_token(model, prompts, results, strategy)
    bound = ceiling.order_blind_ceiling(model, prompts[:: max(1, len(prompts) // 20)], strategy)
    print(
        f"{'target':<20}{strategy.temperature:>5}  {entropy:.2f} nats per token; order-blind ceiling {bound:.2f}",
        file=sys.stderr,
    )
    return {"nats_per_token": entropy, "order_blind_ceiling": bound}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    bits = commands.add_parser("bits", help="held-out bits per byte of a checkpoint")
    bits.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    bits.set_defaults(command=bits_command)
    qat = commands.add_parser("qat", help="BF16 against MXFP4 rounded and MXFP4 trained, same tokens, same budget")
    qat.add_argument("--run", required=True, help="run annealed with --qat")
    qat.set_defaults(command=qat_command)
    acceptance = commands.add_parser("acceptance", help="tokens per round of drafters, on held-out prompts")
    acceptance.add_argument("--model", help="checkpoint directory of the target (default: the bundled model)")
    add_drafter_options(acceptance)
    acceptance.add_argument(
        "--rule", choices=("block", "token"), default="block", help="how sampled drafts are verified"
    )
    acceptance.add_argument("--plot", help="PNG file to write")
    acceptance.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    acceptance.add_argument("--prompt-tokens", type=int, default=128)
    acceptance.add_argument(
        "--tokens", type=int, default=48, help="to generate behind each prompt (small models loop if it is many)"
    )
    acceptance.add_argument("--rows", type=int, default=40, help="prompts per batch")
    acceptance.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    acceptance.set_defaults(command=acceptance_command)
    for command in (bits, qat):
        command.add_argument("--windows", type=int, default=400, help="held-out windows of 512 tokens")
    for command in (bits, qat, acceptance):
        command.add_argument("--data", default="runs/corpus", help="folder of the corpus")
        command.add_argument("--out", help="also write the result to this JSON file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    record = args.command(args)
    if args.out:
        write_atomically(Path(args.out), (json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(record))


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
