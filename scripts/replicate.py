"""Measures a checkpoint against the published claim: environment, checkpoint, gates of correctness, acceptance, speed.

scripts/replicate.py                                                    # the bundled model, as a trial of the kit
scripts/replicate.py --checkpoint MiMo-V2.5-Pro-FP4-DFlash/ --devices 8  # docs/replicate.md says what to rent

Writes report.json after every step, and report.html at the end. Given again, it goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser, need_packages
from mimo_jax.cli.values import output_folder, whole
from mimo_jax.errors import UserError
from mimo_jax.files import exclusive, write_atomically


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    need_packages("replicate", "plots", "matplotlib")
    need_packages("replicate", "serve", "jinja2")
    from mimo_jax.checkpoint.dflash import has_drafter
    from mimo_jax.loading import BUNDLED, find
    from mimo_jax.replication import report
    from mimo_jax.replication.steps import Kit, claims, run_steps

    directory = find(args.checkpoint or BUNDLED)
    if not has_drafter(directory):
        raise UserError(f"replicate: {directory} has no drafter; the claim is about drafted decoding")
    kit = Kit(directory, args.devices, args.prompts, args.tokens, tuple(args.contexts), args.repeats)
    args.out.mkdir(parents=True, exist_ok=True)
    with exclusive(args.out / ".lock", f"{args.out}: another process writes a report there"):
        path = args.out / "report.json"
        found = begun(path, kit)
        run_steps(kit, found["steps"], lambda: write_atomically(path, (json.dumps(found, indent=1) + "\n").encode()))
        write_atomically(args.out / "report.html", report.html_of(found).encode())
    print(f"{report.verdict(found)}\n{args.out / 'report.html'} has all of it", file=sys.stderr)
    print(json.dumps({"report": str(path), "verdict": report.verdict(found), "claims": claims(found["steps"])}))


def begun(path: Path, kit) -> dict:
    """The report that is there already, if it is of the same checkpoint and amounts; else an empty one."""
    from mimo_jax.checkpoint.huggingface import read_hf_config
    from mimo_jax.config.presets import preset

    config, _ = read_hf_config(kit.directory)
    pro = preset("mimo-v2.5-pro")
    asked = {"devices": kit.devices, "prompts": kit.prompts, "tokens": kit.tokens, "repeats": kit.repeats}
    report = {
        "model": kit.directory.resolve().name,
        "is_pro": (config.num_layers, config.hidden_size) == (pro.num_layers, pro.hidden_size),
        "asked": {**asked, "contexts": list(kit.contexts)},
        "steps": {},
    }
    if not path.exists():
        return report
    try:
        held = json.loads(path.read_bytes())
        same = all(held[name] == report[name] for name in ("model", "is_pro", "asked")) and held["steps"].keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is no report of this command; use another --out") from None
    if not same:
        raise UserError(f"{path}: was begun with another checkpoint or other options; use another --out")
    return held


def parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", help="checkpoint directory with a drafter (default: the bundled model)")
    parser.add_argument("--devices", type=whole(1, 1024), default=1, help="that share the model, by tensor parallelism")
    parser.add_argument("--prompts", type=whole(2, 10), default=8, help="of each domain")
    parser.add_argument("--tokens", type=whole(2), default=64, help="after each prompt")
    parser.add_argument(
        "--contexts", type=whole(16), nargs="+", default=[512, 8192, 131_072], help="lengths of prompts for speed"
    )
    parser.add_argument("--repeats", type=whole(1, 1000), default=3, help="of each context length")
    parser.add_argument("--out", type=output_folder, default="runs/replication", help="folder of the report")
    return parser


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
