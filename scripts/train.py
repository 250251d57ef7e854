"""Trains a model, from scratch or from a checkpoint: corpus, pretraining, the descent to rate zero, QAT.

    scripts/train.py corpus   --data runs/corpus
    scripts/train.py pretrain --data runs/corpus --run runs/base --steps 3000
    scripts/train.py anneal   --data runs/corpus --start runs/base --run runs/bf16 --steps 220
    scripts/train.py anneal   --data runs/corpus --start runs/bf16 --run runs/qat --steps 80 --rate 8e-4 --qat
    scripts/train.py pretrain --data runs/corpus --start checkpoint/ --run runs/more --steps 1000
    scripts/train.py export   --data runs/corpus --run runs/qat --out checkpoint/
    scripts/train.py plot     --run runs/base --run runs/qat --out loss.png

Every command can be killed and given again: it goes on from its last save with the same loss curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

from mimo_jax.cli import main_guard
from mimo_jax.errors import UserError


def corpus_command(args: argparse.Namespace) -> dict:
    from mimo_jax.tokenizer import Tokenizer
    from mimo_jax.training import corpus

    roots = [Path(root) for root in args.root] or corpus.default_roots()
    tokenizer = Tokenizer.load(Path(args.tokenizer)) if args.tokenizer else None
    manifest = corpus.build(Path(args.data), roots, args.vocab_size, args.tokenizer_bytes, tokenizer)
    digest = hashlib.sha256((Path(args.data) / "manifest.json").read_bytes()).hexdigest()
    return {key: manifest[key] for key in ("python", "tokens", "bytes", "packages")} | {"manifest_sha256": digest}


def pretrain_command(args: argparse.Namespace) -> dict:
    from mimo_jax.config import preset
    from mimo_jax.model import load_masters
    from mimo_jax.training import run
    from mimo_jax.training.pretraining import TrainConfig, init_state

    train = TrainConfig(batch=args.batch, length=args.length, peak_rate=args.rate, seed=args.seed)
    if args.start:
        _check_same_tokenizer(Path(args.start), Path(args.data))
        config, params = load_masters(Path(args.start), args.dtype)
    else:
        config, params = dataclasses.replace(preset(args.preset), dtype=args.dtype), None
    settings = run.settings_of(config, train, start=args.start)
    return _train(args, config, train, lambda: init_state(config, train, params), settings)


def anneal_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training import run

    start = Path(args.start)
    config, base = run.read_settings(start)
    state = run.latest_state(start, config, base)
    first = int(state.step)
    train = dataclasses.replace(
        base,
        decay_start=first,
        decay_steps=args.steps,
        qat=args.qat,
        distill=args.distill if args.teacher else 0.0,
        peak_rate=args.rate or base.peak_rate,
        batch=args.batch or base.batch,
        length=args.length or base.length,
    )
    args.steps += first
    settings = run.settings_of(config, train, start=start.name, teacher=args.teacher and Path(args.teacher).name)
    return _train(args, config, train, lambda: state, settings, _teacher_params(args, config))


def _teacher_params(args: argparse.Namespace, config):
    from mimo_jax.training import run

    if not args.teacher:
        return None
    teacher_config, teacher_train = run.read_settings(Path(args.teacher))
    if teacher_config != config:
        raise UserError(f"{args.teacher}: its model differs from that of {args.start}")
    return run.latest_state(Path(args.teacher), teacher_config, teacher_train).params


def _check_same_tokenizer(checkpoint: Path, data: Path) -> None:
    files = [directory / "tokenizer.json" for directory in (checkpoint, data)]
    if files[0].read_bytes() != files[1].read_bytes():
        raise UserError(f"{files[1]} differs from {files[0]}; build the corpus with --tokenizer {files[0]}")


def export_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training import run
    from mimo_jax.training.export import export

    config, train = run.read_settings(Path(args.run))
    state = run.latest_state(Path(args.run), config, train)
    export(Path(args.out), config, state.params, Path(args.data) / "tokenizer.json")
    return {"checkpoint": args.out, "step": int(state.step)}


def plot_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training import run

    run.plot_losses([Path(directory) for directory in args.run], Path(args.out))
    return {"plot": args.out}


def _train(args, config, train, fresh_state, settings, teacher=None) -> dict:
    from mimo_jax.checkpoint import orbax
    from mimo_jax.training import corpus, run

    directory = Path(args.run)
    tokens = corpus.load_tokens(Path(args.data), "train")
    run.prepare(directory, settings)
    resumed = orbax.steps(directory / "checkpoints")
    state = run.latest_state(directory, config, train) if resumed else fresh_state()
    run.train_until(directory, tokens, config, train, state, args.steps, teacher)
    if importlib.util.find_spec("matplotlib"):
        run.plot_losses([directory], directory / "loss.png")
    else:
        print("no loss.png: it needs the `plots` extra (pip install -e '.[plots]')", file=sys.stderr)
    last = json.loads((directory / "log.jsonl").read_text().splitlines()[-1])
    return {"run": str(directory), "resumed_at": resumed[-1] if resumed else 0, **last}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")

    corpus = commands.add_parser("corpus", help="tokenizer and token files from Python source on this machine")
    corpus.add_argument("--root", action="append", default=[], help="folder to search (default: this interpreter's)")
    corpus.add_argument("--vocab-size", type=int, default=4096)
    corpus.add_argument("--tokenizer", help="a finished tokenizer.json, instead of training one")
    corpus.add_argument("--tokenizer-bytes", type=int, default=30_000_000, help="text the tokenizer learns from")
    corpus.set_defaults(command=corpus_command)

    pretrain = commands.add_parser("pretrain", help="from random weights or a checkpoint, at a constant rate")
    pretrain.add_argument("--preset", default="mimo-tiny")
    pretrain.add_argument("--start", help="checkpoint folder to go on from, instead of a preset's random weights")
    pretrain.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    pretrain.add_argument("--batch", type=int, default=32, help="sequences per step")
    pretrain.add_argument("--length", type=int, default=256, help="tokens per sequence")
    pretrain.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.set_defaults(command=pretrain_command)

    anneal = commands.add_parser("anneal", help="continue a run while the rate falls to zero")
    anneal.add_argument("--start", required=True, help="the run to continue from")
    anneal.add_argument("--qat", action="store_true", help="train the experts as MXFP4 will store them")
    anneal.add_argument("--teacher", help="a run of the same model to distil from, usually the one without --qat")
    anneal.add_argument("--distill", type=float, default=1.0, help="share of the loss given to the teacher's distance")
    anneal.add_argument("--rate", type=float, help="learning rate to come down from (default: as before)")
    anneal.add_argument("--batch", type=int, help="sequences per step (default: as before)")
    anneal.add_argument("--length", type=int, help="tokens per sequence (default: as before)")
    anneal.set_defaults(command=anneal_command)

    export = commands.add_parser("export", help="write a finished run as a checkpoint in the FP4-DFlash layout")
    export.add_argument("--run", required=True, help="the run to export")
    export.add_argument("--out", required=True, help="folder to write; must not exist")
    export.set_defaults(command=export_command)

    plot = commands.add_parser("plot", help="the losses of several runs in one picture")
    plot.add_argument("--run", action="append", required=True, help="a run; repeat it")
    plot.add_argument("--out", required=True, help="PNG file to write")
    plot.set_defaults(command=plot_command)

    for command in (corpus, pretrain, anneal, export):
        command.add_argument("--data", default="runs/corpus", help="folder of the corpus")
    for command in (pretrain, anneal):
        command.add_argument("--run", required=True, help="folder of the run: log, plot, checkpoints")
        command.add_argument("--steps", type=int, required=True, help="updates to make")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main_guard(lambda: print(json.dumps((args := parse(sys.argv[1:])).command(args))))
