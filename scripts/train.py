"""Trains a model, from scratch or from a checkpoint: pretraining, the descent to rate zero, QAT, the drafter, reading.

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
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser, add_mesh_options, mesh_of
from mimo_jax.cli.plots import need_matplotlib
from mimo_jax.cli.values import folder, new_folder, output_file, output_folder, real, whole

if TYPE_CHECKING:
    from mimo_jax.training.launch import Launch


def corpus_command(args: argparse.Namespace) -> dict:
    from mimo_jax.tokenizer import Tokenizer
    from mimo_jax.training import corpus

    roots = [Path(root) for root in args.root] or corpus.default_roots()
    tokenizer = Tokenizer.load(Path(args.tokenizer)) if args.tokenizer else None
    manifest = corpus.build(args.data, roots, args.vocab_size, args.tokenizer_bytes, tokenizer)
    found = {key: manifest[key] for key in ("python", "tokens", "bytes", "packages")}
    return found | {"manifest_sha256": corpus.digest(args.data / corpus.MANIFEST)}


def launch_of(args: argparse.Namespace) -> Launch:
    mesh = mesh_of(args)
    from mimo_jax.training.launch import Launch

    return Launch(args.run, Path(args.data), args.steps, mesh, args.save_every)


def pretrain_command(args: argparse.Namespace) -> dict:
    launch = launch_of(args)
    from mimo_jax.training.launch import pretrain
    from mimo_jax.training.pretraining import TrainConfig

    train = TrainConfig(batch=args.batch, length=args.length, peak_rate=args.rate, seed=args.seed)
    return pretrain(launch, train, args.preset, args.start, args.dtype)


def anneal_command(args: argparse.Namespace) -> dict:
    launch = launch_of(args)
    from mimo_jax.training.launch import anneal

    changes = {"peak_rate": args.rate, "batch": args.batch, "length": args.length}
    return anneal(launch, Path(args.start), args.qat, **changes)


def export_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training.export import export

    return export(Path(args.run), Path(args.data) / "tokenizer.json", args.out)


def self_distill_command(args: argparse.Namespace) -> dict:
    from mimo_jax.loading import load
    from mimo_jax.training.corpus import load_tokens
    from mimo_jax.training.self_distillation import DistillationConfig, generate_texts

    settings = DistillationConfig(args.length, args.rows, temperatures=tuple(args.temperature), seed=args.seed)
    tokens = load_tokens(Path(args.data), "train")
    texts = generate_texts(load(args.model, draft="none"), tokens, settings, args.out, args.chunks)
    return {"texts": str(args.out), "rows": len(texts), "tokens": int((texts.ends - texts.starts).sum())}


def drafter_command(args: argparse.Namespace) -> dict:
    launch = launch_of(args)
    from mimo_jax.training.drafter import DraftTrainConfig, Geometry
    from mimo_jax.training.launch import train_drafter

    layers = tuple(args.target_layer_ids) if args.target_layer_ids else None
    geometry = Geometry(args.layers, args.window, args.bias_rank, args.lookup, layers)
    train = DraftTrainConfig(
        steps=args.steps,
        batch=args.batch,
        anchors=args.anchors,
        kind=args.kind,
        loss=args.loss,
        optimizer=args.optimizer,
        peak_rate=args.rate,
        human_share=args.human_share,
        bare_share=args.bare_share,
        seed=args.seed,
    )
    return train_drafter(launch, Path(args.model), Path(args.texts), train, geometry, args.start)


def export_drafter_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training.export import export_drafter

    checkpoint = Path(args.checkpoint) if args.checkpoint else None
    return export_drafter(Path(args.run), args.out, checkpoint, args.expect, args.expect_published)


def characters_command(args: argparse.Namespace) -> dict:
    launch = launch_of(args)
    from mimo_jax.training.reading.characters import CharacterConfig
    from mimo_jax.training.reading.launch import train_characters

    train = CharacterConfig(args.steps, args.rows, args.rate, seed=args.seed)
    start = Path(args.start) if args.start else None
    return train_characters(launch, Path(args.model), args.fonts, train, start, args.workers)


def copying_command(args: argparse.Namespace) -> dict:
    launch = launch_of(args)
    from mimo_jax.training.reading.copying import CopyConfig
    from mimo_jax.training.reading.launch import train_copying

    own = {"peak_rate": args.rate, "faithful": args.faithful, "seed": args.seed}
    train = CopyConfig(args.steps, args.rows, args.windows, **own)
    return train_copying(launch, Path(args.model), train, Path(args.start) if args.start else None, args.workers)


def export_copying_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training.reading.launch import export_copying

    return export_copying(Path(args.run), Path(args.model), args.out)


def export_characters_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training.reading.launch import export_characters

    return export_characters(Path(args.run), Path(args.model), args.out)


def join_command(args: argparse.Namespace) -> dict:
    launch = launch_of(args)
    from mimo_jax.training.reading.joining import JoinConfig
    from mimo_jax.training.reading.launch import train_join

    own = {"peak_rate": args.rate, "faithful": args.faithful, "seed": args.seed}
    train = JoinConfig(args.steps, args.rows, args.windows, **own)
    return train_join(launch, Path(args.model), Path(args.start), args.fonts, train, args.workers)


def export_seeing_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training.reading.launch import export_seeing

    return export_seeing(Path(args.run), Path(args.model), args.out)


def plot_command(args: argparse.Namespace) -> dict:
    from mimo_jax.training import run

    need_matplotlib()
    run.plot_losses([Path(directory) for directory in args.run], args.out)
    return {"plot": str(args.out)}


def parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    corpus = commands.add_parser("corpus", help="tokenizer and token files from Python source on this machine")
    corpus.add_argument("--root", action="append", default=[], help="folder to search (default: this interpreter's)")
    corpus.add_argument("--vocab-size", type=int, default=4096)
    corpus.add_argument("--tokenizer", help="a finished tokenizer.json, instead of training one")
    corpus.add_argument("--tokenizer-bytes", type=whole(1), default=30_000_000, help="text the tokenizer learns from")
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
    export.add_argument("--out", type=new_folder, required=True, help="folder to write; must not exist")
    export.set_defaults(command=export_command)

    distill = commands.add_parser("self-distill", help="text written by the target, for its drafter to learn from")
    distill.add_argument(
        "--out", type=output_folder, required=True, help="folder of chunk files; those that exist are kept"
    )
    distill.add_argument("--chunks", type=whole(1), required=True, help="chunk files to have in the end")
    distill.add_argument("--rows", type=int, default=128, help="sequences per chunk")
    distill.add_argument("--length", type=int, default=256, help="tokens per sequence, its prompt included")
    distill.add_argument(
        "--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0], help="taken in turn by chunks"
    )
    distill.set_defaults(command=self_distill_command)

    drafter = commands.add_parser("drafter", help="a DFlash drafter for a checkpoint, from text it wrote")
    drafter.add_argument("--texts", default="runs/texts", help="folder that self-distill wrote")
    drafter.add_argument(
        "--kind", choices=("block", "chain"), default="block", help="chain: the control, token by token"
    )
    drafter.add_argument("--start", help="dflash folder to go on from, instead of random weights of this geometry:")
    drafter.add_argument("--layers", type=int, default=2)
    drafter.add_argument("--window", type=int, default=128, help="context tokens a block sees")
    drafter.add_argument(
        "--target-layer-ids", type=int, nargs="+", help="layers of the target it reads (-1: only the embedding)"
    )
    drafter.add_argument("--bias-rank", type=int, default=0, help="of the order-aware bias; a start may lack it")
    drafter.add_argument("--lookup", type=int, default=0, help="newest tokens that prompt lookup searches for guesses")
    drafter.add_argument("--loss", choices=("soft", "soft-dpace", "decay", "dpace", "tv"), default="soft")
    drafter.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    drafter.add_argument("--batch", type=int, default=16, help="sequences per step")
    drafter.add_argument("--anchors", type=int, default=24, help="blocks per sequence")
    drafter.add_argument("--human-share", type=float, default=0.0, help="of sequences taken from the corpus instead")
    drafter.add_argument("--bare-share", type=float, default=0.0, help="of blocks drafted without bias and lookup")
    drafter.add_argument("--rate", type=float, default=5e-3, help="peak learning rate")
    drafter.set_defaults(command=drafter_command)

    export_drafter = commands.add_parser("export-drafter", help="write a trained drafter as a dflash/ folder")
    export_drafter.add_argument("--run", required=True, help="the run to export")
    place = export_drafter.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=new_folder, help="folder to write; must not exist")
    place.add_argument("--checkpoint", help="checkpoint to put it into, in place of the drafter it has")
    export_drafter.add_argument(
        "--expect", type=real(1, 1000), help="tokens per round that `evaluate.py acceptance` measured"
    )
    export_drafter.add_argument("--expect-published", type=real(1, 1000), help="the same of the drafter without extras")
    export_drafter.set_defaults(command=export_drafter_command)

    characters = commands.add_parser("characters", help="a vision tower that tells characters and tokens in pictures")
    characters.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    characters.add_argument("--start", help="checkpoint with a tower to go on from, instead of random weights")
    characters.set_defaults(command=characters_command)

    copying = commands.add_parser("copying", help="the text model learns to write down what rows of a tower say")
    copying.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    copying.add_argument("--faithful", type=float, default=4.0, help="weight of what is said of plain text")
    copying.add_argument("--start", help="checkpoint that has begun to learn it, to go on from")
    copying.set_defaults(command=copying_command)

    export_copying = commands.add_parser("export-copying", help="write the checkpoint with what has learnt to copy")
    export_copying.set_defaults(command=export_copying_command)

    export_characters = commands.add_parser("export-characters", help="write the checkpoint with a tower beside it")
    export_characters.set_defaults(command=export_characters_command)

    join = commands.add_parser("join", help="a tower and a text model that copies go on learning, together")
    join.add_argument("--start", required=True, help="checkpoint with both, to go on from")
    join.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    join.add_argument("--faithful", type=float, default=20.0, help="weight of what is said of plain text")
    join.set_defaults(command=join_command)

    export_seeing = commands.add_parser("export-seeing", help="write the checkpoint with what a join has learnt")
    export_seeing.set_defaults(command=export_seeing_command)

    exports = export_copying, export_characters, export_seeing
    for command in exports:
        command.add_argument("--run", required=True, help="the run to export")
        command.add_argument("--out", type=new_folder, required=True, help="folder to write; must not exist")
    for command in (characters, copying, join):
        command.add_argument("--rows", type=whole(256), default=1024, help="of pictures, in a step")
        command.add_argument("--workers", type=whole(0, 1024), default=0, help="processes that make them (0: this one)")
    for command in (copying, join):
        command.add_argument("--windows", type=int, default=4, help="of plain text, in a step")
    for command in (characters, join):
        command.add_argument("--fonts", type=folder, help="folder that `make fonts` installed them into")

    plot = commands.add_parser("plot", help="the losses of several runs in one picture")
    plot.add_argument("--run", action="append", required=True, help="a run; repeat it")
    plot.add_argument("--out", type=output_file, required=True, help="PNG file to write")
    plot.set_defaults(command=plot_command)

    for command in (distill, drafter, characters, copying, join, *exports):
        command.add_argument("--model", required=True, help="checkpoint folder of the target")
    for command in (pretrain, distill, drafter, characters, copying, join):
        command.add_argument("--seed", type=int, default=0)
    corpus.add_argument("--data", type=output_folder, default="runs/corpus", help="folder of the corpus")
    for command in (pretrain, anneal, export, distill, drafter, characters, copying, join):
        command.add_argument("--data", default="runs/corpus", help="folder of the corpus")
    for command in (pretrain, anneal, drafter, characters, copying, join):
        command.add_argument(
            "--run", type=output_folder, required=True, help="folder of the run: log, plot, checkpoints"
        )
        command.add_argument("--steps", type=whole(1), required=True, help="updates to make")
        command.add_argument("--save-every", type=whole(1), default=100, help="so many updates")
        add_mesh_options(command)
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    print(json.dumps(args.command(args)))


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
