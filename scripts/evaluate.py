"""Measures a trained model on held-out Python.

scripts/evaluate.py bits --model path/to/checkpoint            # bits per byte of a checkpoint
scripts/evaluate.py qat --bf16 runs/bf16_on --qat runs/qat     # what MXFP4 costs, with and without QAT
scripts/evaluate.py acceptance --model path/to/checkpoint      # what the target accepts of its drafter's blocks
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from mimo_jax.cli import main_guard
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

    rows = (
        ("BF16", args.bf16, as_bf16),
        ("MXFP4, rounded after training", args.bf16, as_mxfp4),
        ("MXFP4, after QAT", args.qat, as_mxfp4),
    )
    heldout, record = _heldout(args), {}
    for name, directory, cast in rows:
        config, train = run.read_settings(Path(directory))
        state = run.latest_state(Path(directory), config, train)
        found = bits_per_byte(cast(state.params), config, *heldout, windows=args.windows)
        record[name] = {**dataclasses.asdict(found), "step": int(state.step)}
    best, rounded, trained = (record[name]["bits_per_byte"] for name, _, _ in rows)
    record["QAT above BF16, percent"] = 100 * (trained / best - 1)
    record["rounding loss recovered, percent"] = 100 * (rounded - trained) / (rounded - best)
    for name, _, _ in rows:
        value = record[name]["bits_per_byte"]
        print(f"{name:<32}{value:8.4f}  {100 * (value / best - 1):+6.2f} %", file=sys.stderr)
    print(f"rounding loss recovered {record['rounding loss recovered, percent']:18.0f} %", file=sys.stderr)
    return record


def acceptance_command(args: argparse.Namespace) -> dict:
    from mimo_jax.baselines import NgramDrafter
    from mimo_jax.model import BUNDLED, load, with_drafter
    from mimo_jax.sampling import Greedy, Sampled
    from mimo_jax.training.acceptance import continue_all, is_degenerate, measure, prompts_of

    plain = load(args.model or BUNDLED, unpack=True, draft=False)
    prompts = prompts_of(_heldout(args)[0], args.prompts, args.prompt_tokens)
    models = {"n-gram": dataclasses.replace(plain, drafter=NgramDrafter())}
    for folder in args.drafter or [Path(args.model or BUNDLED) / "dflash"]:
        models[str(folder)] = with_drafter(plain, Path(folder))
    record: dict = {"prompts": len(prompts), "max_tokens": args.tokens, "rows": []}
    print(f"{'drafter':<28}{'T':>5}  {'tokens per round':<18}conditional acceptance per slot", file=sys.stderr)
    for temperature in args.temperature:
        strategy = Sampled(temperature) if temperature else Greedy()
        for name, model in models.items():
            results = continue_all(model, prompts, strategy, args.tokens, args.rows, f"{name} T={temperature}")
            texts = {"all": results, "no loops": [row for row in results if not is_degenerate(row.tokens)]}
            for kind, chosen in texts.items():
                if len(chosen) < 2:
                    continue
                found = measure(chosen)
                record["rows"].append({"drafter": name, "temperature": temperature, "texts": kind} | vars(found))
                slots = " ".join(f"{value:.2f}" for value in found.conditional)
                figure = f"{found.tokens_per_round:.2f} +- {found.half_width:.2f} ({kind})"
                print(f"{name:<28}{temperature:>5}  {figure:<24}{slots}", file=sys.stderr)
    return record


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    bits = commands.add_parser("bits", help="held-out bits per byte of a checkpoint")
    bits.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    bits.set_defaults(command=bits_command)
    qat = commands.add_parser("qat", help="BF16 against MXFP4 rounded and MXFP4 trained, same tokens, same budget")
    qat.add_argument("--bf16", required=True, help="run annealed without --qat")
    qat.add_argument("--qat", required=True, help="run annealed with --qat")
    qat.set_defaults(command=qat_command)
    acceptance = commands.add_parser("acceptance", help="tokens per round of drafters, on held-out prompts")
    acceptance.add_argument("--model", help="checkpoint directory of the target (default: the bundled model)")
    acceptance.add_argument("--drafter", action="append", help="dflash folder; repeat it (default: the checkpoint's)")
    acceptance.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    acceptance.add_argument("--prompt-tokens", type=int, default=64)
    acceptance.add_argument("--tokens", type=int, default=128, help="tokens to generate behind each prompt")
    acceptance.add_argument("--rows", type=int, default=20, help="prompts per batch")
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
