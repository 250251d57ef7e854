"""Runs a study and compares its arms: what is varied, by which seeds, what is measured and for how long, a file says.

scripts/ablate.py scripts/studies/scale_rule.toml                     # into runs/scale_rule; given again, it goes on
scripts/ablate.py scripts/studies/scale_rule.toml --minutes 5         # for another budget
scripts/ablate.py --list                                      # experiments, their settings and metrics

The folder gets runs.jsonl (one line for each run, with all that is needed to repeat it), table.md, table.json and
table.png.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser, need_packages
from mimo_jax.cli.values import output_folder, real
from mimo_jax.errors import UserError
from mimo_jax.files import write_atomically


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.list:
        print(listing())
        return
    if args.study is None:
        raise UserError("ablate: name the file of a study, or --list")
    need_packages("ablate", "plots", "matplotlib", "scipy")
    from mimo_jax.ablation import report
    from mimo_jax.ablation.runner import run_study
    from mimo_jax.ablation.study import read_study

    study = read_study(args.study)
    if args.minutes is not None:
        study = dataclasses.replace(study, minutes=args.minutes)
    out = args.out or Path("runs") / args.study.stem
    records = run_study(study, out, lambda line: print(line, file=sys.stderr))
    if not records:
        raise UserError(f"{args.study}: its budget allowed no run")
    rows = report.rows_of(study, records)
    table = report.table_of(study, rows)
    made, wanted = len(records), len(study.arms) * len(study.seeds)
    result = {"title": study.title, "runs": made, "of": wanted, "minutes": study.minutes, "rows": rows}
    write_atomically(out / "table.md", table.encode())
    write_atomically(out / "table.json", (json.dumps(result, indent=1) + "\n").encode())
    report.plot(study, rows, out / "table.png")
    print(table, file=sys.stderr)
    print(json.dumps({"out": str(out), **result}))


def listing() -> str:
    from mimo_jax.ablation.experiments import EXPERIMENTS

    lines = []
    for name, experiment in EXPERIMENTS.items():
        lines.append(f"{name}: {experiment.about}")
        lines += [f"  {setting:<18} {rule}" for setting, rule in experiment.rules.items()]
        lines += [f"  -> {metric:<15} {text}" for metric, text in experiment.metrics.items()]
    return "\n".join(lines)


def parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("study", nargs="?", type=Path, help="TOML file")
    parser.add_argument("--out", type=output_folder, help="folder of its runs (default: runs/ and the file's name)")
    parser.add_argument("--minutes", type=real(0.01, 100_000), help="budget, instead of the file's")
    parser.add_argument("--list", action="store_true", help="what a study can name")
    return parser


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
