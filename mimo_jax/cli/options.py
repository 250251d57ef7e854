"""Options that several commands share."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mimo_jax.cli.distributed import join
from mimo_jax.cli.values import address, real, whole
from mimo_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh


MOST_PROCESSES = 10_000


class Parser(argparse.ArgumentParser):
    """Says what is wrong with arguments in one line; `description` keeps its lines."""

    def __init__(self, *args, formatter_class=argparse.RawDescriptionHelpFormatter, **options) -> None:
        super().__init__(*args, formatter_class=formatter_class, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; --help lists what it takes")


def need_packages(what: str, extra: str, *packages: str) -> None:
    """Raises, before any work is done, where packages of an extra are absent."""
    if absent := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"{what}: not installed: {', '.join(absent)}; install them with: pip install -e '.[{extra}]'")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and the options that `load_options` reads."""
    parser.add_argument(
        "--model", help="checkpoint directory, Hugging Face or Orbax, or smollm2 (default: the bundled model)"
    )
    add_draft_options(parser)
    parser.add_argument(
        "--no-generation-config",
        action="store_true",
        help="greedy by default, whatever the checkpoint's generation_config.json says",
    )
    parser.add_argument("--verify", action="store_true", help="compare every file with the checkpoint's manifest first")


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """The options that `draft_options` reads."""
    parser.add_argument(
        "--draft",
        metavar="NAME",
        help="what drafts: none, lookup (of the text itself), mtp or dflash (of the checkpoint); it changes no text's "
        "distribution (default: lookup for smollm2; none on a CPU; else dflash if it is there; what pays, benchmark.py "
        "draft measures)",
    )
    add_confidence_option(parser)


def add_confidence_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--confidence",
        type=real(0, 1),
        metavar="P",
        help="mtp and dflash: a block ends where the drafter holds all up to it likely to less than this degree; 0: "
        "whole blocks (default: 0.2 for dflash in the native step of a CPU, else 0)",
    )


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `loading.load` is told beside the checkpoint."""
    return draft_options(args) | {"generation_config": not args.no_generation_config, "verify": args.verify}


def draft_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"draft": args.draft, "confidence": args.confidence}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options that `sampling_of` reads."""
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: what the checkpoint says)")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--min-p", type=float)


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """What is asked for, in the words of a generation_config.json; empty where that is to decide."""
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    given = {name: value for name, value in given.items() if value is not None}
    if not args.greedy and args.temperature != 0:
        return given
    if given.keys() - {"temperature"} or args.temperature:
        raise UserError("sampling: --greedy leaves nothing to --temperature, --top-k, --top-p and --min-p")
    return {"do_sample": False}


def add_drafter_options(parser: argparse.ArgumentParser) -> None:
    """The options that `named_folders` reads: drafters to be measured."""
    parser.add_argument(
        "--drafter", action="append", default=[], help="[NAME=]dflash folder; repeat it (default: the checkpoint's)"
    )
    parser.add_argument("--chain", action="append", default=[], help="the same for drafters trained as a chain")


def named_folders(specs: list[str]) -> dict[str, Path]:
    """Folders given as NAME=FOLDER, or as FOLDER, which then is its own name."""
    return {name or folder: Path(folder) for name, _, folder in (spec.rpartition("=") for spec in specs)}


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """The options that `mesh_of` reads."""
    group = parser.add_argument_group("devices and machines")
    group.add_argument("--data-parallel", type=int, default=1, help="copies of the model, which share the batch")
    group.add_argument("--expert-parallel", type=int, default=1, help="groups that experts are distributed over")
    group.add_argument(
        "--tensor-parallel", type=int, default=1, help="devices that share every matrix; the whole is the product"
    )
    group.add_argument("--distributed", action="store_true", help="find the processes of Slurm, MPI or Kubernetes")
    group.add_argument("--coordinator", type=address, help="host:port of process 0, where nothing can be found")
    group.add_argument("--num-processes", type=whole(1, MOST_PROCESSES))
    group.add_argument("--process-id", type=whole(0, MOST_PROCESSES))


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """Joins the other processes, if there are any, and makes the mesh; None for one device."""
    by_hand = (args.coordinator, args.num_processes, args.process_id)
    if any(value is not None for value in by_hand) and None in by_hand:
        raise UserError("distributed: --coordinator, --num-processes and --process-id belong together")
    from mimo_jax.sharding import MeshShape, make_mesh

    shape = MeshShape(args.data_parallel, args.expert_parallel, args.tensor_parallel)
    if args.distributed or args.coordinator:
        join(*by_hand)
    return make_mesh(shape) if shape.devices > 1 else None
