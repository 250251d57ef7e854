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
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

from mimo_jax.cli import main_guard, need_matplotlib
from mimo_jax.distributed import add_mesh_options, mesh_of
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
    from mimo_jax.model import load_dense
    from mimo_jax.training import run
    from mimo_jax.training.pretraining import TrainConfig, init_state

    mesh = mesh_of(args)
    train = TrainConfig(batch=args.batch, length=args.length, peak_rate=args.rate, seed=args.seed)
    if args.start:
        _check_same_tokenizer(Path(args.start), Path(args.data))
        start = load_dense(Path(args.start), args.dtype)
        config, params = start.config, start.params
    else:
        config, params = dataclasses.replace(preset(args.preset), dtype=args.dtype), None
    settings = run.settings_of(config, train, start=args.start)
    return _pretrain(args, config, train, lambda: init_state(config, train, params), settings, mesh)


def anneal_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training import qat, run

    start, mesh = Path(args.start), mesh_of(args)
    config, base = run.read_settings(start)
    state = run.latest_state(start, config, base)
    if isinstance(state, qat.QatState):
        raise UserError(f"--start {start} is a run with QAT, which ends a training; start from one without")
    first = int(state.step)
    train = dataclasses.replace(
        base,
        decay_start=first,
        decay_steps=args.steps,
        qat=args.qat,
        peak_rate=args.rate or base.peak_rate,
        batch=args.batch or base.batch,
        length=args.length or base.length,
    )
    args.steps += first
    settings = run.settings_of(config, train, start=start.name)
    return _pretrain(args, config, train, lambda: qat.begin(state, train) if args.qat else state, settings, mesh)


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


def selfgen_command(args: argparse.Namespace) -> dict:
    from mimo_jax.model import load_dense
    from mimo_jax.training import corpus, selfgen

    model = load_dense(Path(args.model))
    settings = selfgen.SelfGenConfig(args.length, args.rows, temperatures=tuple(args.temperature), seed=args.seed)
    tokens = corpus.load_tokens(Path(args.data), "train")
    texts = selfgen.generate_texts(model, tokens, settings, Path(args.out), args.chunks)
    return {"texts": args.out, "rows": len(texts), "tokens": int((texts.ends - texts.starts).sum())}


def drafter_command(args: argparse.Namespace) -> dict:
    from mimo_jax.model import load_dense, load_drafter
    from mimo_jax.sharding import check_rows
    from mimo_jax.training import corpus, drafter, run, selfgen

    mesh = mesh_of(args)
    model, texts = load_dense(Path(args.model), mesh=mesh), selfgen.load_texts(Path(args.texts))
    if args.kind == "chain" and (args.bias_rank or args.lookup):
        raise UserError("drafter: a chain has neither --bias-rank nor --lookup; it sees the tokens drafted before")
    if args.start and args.kind == "chain":
        config, params = drafter.as_chain(*load_drafter(model.config, Path(args.start)))
    elif args.start:
        started = load_drafter(model.config, Path(args.start))
        config, params = drafter.extended(*started, args.bias_rank, args.lookup, args.seed)
    else:
        taps, params = tuple(args.taps) if args.taps else None, None
        added = args.bias_rank, args.lookup
        config = drafter.drafter_for(model.config, model.tokenizer, args.layers, args.window, *added, taps)
    train = drafter.DraftTrainConfig(
        steps=args.steps,
        batch=args.batch,
        anchors=args.anchors,
        kind=args.kind,
        loss=args.loss,
        optimizer=args.optimizer,
        peak_rate=args.rate,
        human_share=args.human_share,
        seed=args.seed,
    )
    check_rows(train.batch, mesh, "sequences of a batch")
    update = drafter.training_update(texts, corpus.load_tokens(Path(args.data), "train"), model, config, train)
    tokens_per_step = args.batch * texts.tokens.shape[1]
    settings = run.settings_of(config, train, start=args.start)
    return _train(args, settings, lambda: drafter.init_state(config, train, params), update, tokens_per_step, mesh)


def export_drafter_command(args: argparse.Namespace) -> dict:
    from mimo_jax.checkpoint.dflash import attach_drafter, write_drafter
    from mimo_jax.training import drafter

    config, train = drafter.read_settings(Path(args.run))
    state = drafter.latest_state(Path(args.run), config, train)
    config = dataclasses.replace(config, param_dtype="bfloat16", acceptance_length=args.expect)
    if args.checkpoint:
        attach_drafter(Path(args.checkpoint), config, state.params)
    else:
        write_drafter(Path(args.out), config, state.params)
    return {"drafter": args.checkpoint or args.out, "step": int(state.step)}


def plot_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training import run

    need_matplotlib()
    run.plot_losses([Path(directory) for directory in args.run], Path(args.out))
    return {"plot": args.out}


def _pretrain(args, config, train, fresh_state, settings, mesh) -> dict:
    from mimo_jax.sharding import check_rows, layout_of
    from mimo_jax.training import corpus, run

    if mesh is not None:
        layout_of(mesh).check_divides(config)
    check_rows(train.batch, mesh, "sequences of a batch")
    check_rows(train.mtp_rows, mesh, "sequences of a batch that train the MTP layers")
    update = run.pretraining_update(corpus.load_tokens(Path(args.data), "train"), config, train, mesh)
    return _train(args, settings, fresh_state, update, train.batch * train.length, mesh)


def _train(args, settings, fresh_state, update, tokens_per_step: int, mesh) -> dict:
    """Starts a run, or goes on with it from its last save; returns its last logged line."""
    import jax

    from mimo_jax.checkpoint import orbax
    from mimo_jax.sharding import place
    from mimo_jax.training import run

    directory = Path(args.run)
    run.prepare(directory, settings)
    resumed = orbax.steps(directory / "checkpoints")
    state = run.restore(directory, fresh_state, mesh) if resumed else fresh_state()
    if mesh is not None and not resumed:
        state = place(state, mesh)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        run.train_until(directory, state, args.steps, update, tokens_per_step)
    if jax.process_index():
        return {}
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
    pretrain.set_defaults(command=pretrain_command)

    anneal = commands.add_parser("anneal", help="continue a run while the rate falls to zero")
    anneal.add_argument("--start", required=True, help="the run to continue from")
    anneal.add_argument("--qat", action="store_true", help="learn beside it how the experts are rounded to MXFP4")
    anneal.add_argument("--rate", type=float, help="learning rate to come down from (default: as before)")
    anneal.add_argument("--batch", type=int, help="sequences per step (default: as before)")
    anneal.add_argument("--length", type=int, help="tokens per sequence (default: as before)")
    anneal.set_defaults(command=anneal_command)

    export = commands.add_parser("export", help="write a finished run as a checkpoint in the FP4-DFlash layout")
    export.add_argument("--run", required=True, help="the run to export")
    export.add_argument("--out", required=True, help="folder to write; must not exist")
    export.set_defaults(command=export_command)

    selfgen = commands.add_parser("selfgen", help="text written by the target, for its drafter to learn from")
    selfgen.add_argument("--out", required=True, help="folder of chunk files; those that exist are kept")
    selfgen.add_argument("--chunks", type=int, required=True, help="chunk files to have in the end")
    selfgen.add_argument("--rows", type=int, default=128, help="sequences per chunk")
    selfgen.add_argument("--length", type=int, default=256, help="tokens per sequence, its prompt included")
    selfgen.add_argument(
        "--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0], help="taken in turn by chunks"
    )
    selfgen.set_defaults(command=selfgen_command)

    drafter = commands.add_parser("drafter", help="a DFlash drafter for a checkpoint, from text it wrote")
    drafter.add_argument("--texts", default="runs/texts", help="folder that selfgen wrote")
    drafter.add_argument(
        "--kind", choices=("block", "chain"), default="block", help="chain: the control, token by token"
    )
    drafter.add_argument("--start", help="dflash folder to go on from, instead of random weights of this geometry:")
    drafter.add_argument("--layers", type=int, default=2)
    drafter.add_argument("--window", type=int, default=128, help="context tokens a block sees")
    drafter.add_argument("--taps", type=int, nargs="+", help="layers of the target it reads (-1: only the embedding)")
    drafter.add_argument("--bias-rank", type=int, default=0, help="of the order-aware bias; a start may lack it")
    drafter.add_argument("--lookup", type=int, default=0, help="newest tokens that prompt lookup searches for guesses")
    drafter.add_argument("--loss", choices=("soft", "soft-dpace", "decay", "dpace", "tv"), default="soft")
    drafter.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    drafter.add_argument("--batch", type=int, default=16, help="sequences per step")
    drafter.add_argument("--anchors", type=int, default=24, help="blocks per sequence")
    drafter.add_argument("--human-share", type=float, default=0.0, help="of sequences taken from the corpus instead")
    drafter.add_argument("--rate", type=float, default=5e-3, help="peak learning rate")
    drafter.set_defaults(command=drafter_command)

    export_drafter = commands.add_parser("export-drafter", help="write a trained drafter as a dflash/ folder")
    export_drafter.add_argument("--run", required=True, help="the run to export")
    place = export_drafter.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", help="folder to write; must not exist")
    place.add_argument("--checkpoint", help="checkpoint to put it into, in place of the drafter it has")
    export_drafter.add_argument("--expect", type=float, help="tokens per round that `evaluate.py acceptance` measured")
    export_drafter.set_defaults(command=export_drafter_command)

    plot = commands.add_parser("plot", help="the losses of several runs in one picture")
    plot.add_argument("--run", action="append", required=True, help="a run; repeat it")
    plot.add_argument("--out", required=True, help="PNG file to write")
    plot.set_defaults(command=plot_command)

    for command in (selfgen, drafter):
        command.add_argument("--model", required=True, help="checkpoint folder of the target")
    for command in (pretrain, selfgen, drafter):
        command.add_argument("--seed", type=int, default=0)
    for command in (corpus, pretrain, anneal, export, selfgen, drafter):
        command.add_argument("--data", default="runs/corpus", help="folder of the corpus")
    for command in (pretrain, anneal, drafter):
        command.add_argument("--run", required=True, help="folder of the run: log, plot, checkpoints")
        command.add_argument("--steps", type=int, required=True, help="updates to make")
        add_mesh_options(command)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main_guard(lambda: print(json.dumps((args := parse(sys.argv[1:])).command(args))))
