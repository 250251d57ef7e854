"""What a model needs and how fast it could be on GPUs that are not at hand. Projected figures are labelled so.

scripts/plan.py --preset mimo-v2.5-pro --target 8xh200            # bytes, transfers, speed; compiles the programs
scripts/plan.py --target 16xb200 --expert-parallel 2 --context 1048576     # another machine and mesh
scripts/plan.py --no-compile --timeline round.png --tokens 8               # the persistent step, SM by SM
"""

from __future__ import annotations

import json
import sys

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser
from mimo_jax.cli.plots import need_matplotlib
from mimo_jax.cli.values import output_file, whole
from mimo_jax.errors import UserError


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.plot or args.timeline:
        need_matplotlib()
    from mimo_jax.config.presets import drafter_preset, preset, preset_format
    from mimo_jax.planning import compiled, report, timeline
    from mimo_jax.planning.machines import parse_target
    from mimo_jax.planning.traffic import Plan, mesh_shape_for
    from pallas_kernels import topology

    config, target = preset(args.preset), parse_target(args.target)
    groups = args.expert_parallel
    if groups < 1 or target.count % groups:
        raise UserError(f"plan: --expert-parallel {groups} must divide the {target.count} devices of {target}")
    if not 0 < args.context <= config.max_position:
        raise UserError(f"plan: --context {args.context} must lie in 1..{config.max_position}")
    shape, drafter = mesh_shape_for(config, target.count, groups), drafter_preset(args.preset)
    file_format = preset_format(args.preset)
    plan = Plan(config, file_format, drafter, shape, cache_itemsize=2, backend=args.expert_backend)
    simulated = timeline.step_timeline(plan, target, args.tokens) if args.timeline else None
    programs, reason = {}, None if args.no_compile else topology.missing()
    if not args.no_compile and reason is None:
        programs, reason = compiled.compile_programs(plan, target, args.context), topology.without_triton()
    elif reason:
        reason = f"without the compiled programs: {reason}"
    record = report.record_of(plan, target, args.context, programs)
    if not args.json:
        print(report.text_of(record))
    if simulated:
        record["timeline"] = timeline.record_of(simulated, args.tokens, target)
        timeline.draw(simulated, args.timeline)
        if not args.json:
            print(timeline.text_of(record["timeline"]))
    if reason:
        print(f"plan: {reason}", file=sys.stderr)
    if args.plot:
        report.plot(record, args.plot)
    print(json.dumps(record))


def parser() -> Parser:
    from pallas_kernels.expert_matmul import BACKENDS

    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="mimo-v2.5-pro")
    parser.add_argument("--target", default="8xh200", help="COUNTxGPU: 1 to 16 of h100, h200, b200")
    parser.add_argument("--expert-parallel", type=whole(1), default=1, help="groups that experts are distributed over")
    parser.add_argument("--context", type=whole(1), default=131_072, help="cached tokens of the row that decodes")
    parser.add_argument(
        "--expert-backend", choices=BACKENDS, help="what multiplies the experts (default: the fastest for the target)"
    )
    parser.add_argument("--no-compile", action="store_true", help="only what needs no compiler")
    parser.add_argument("--json", action="store_true", help="print nothing but the line of JSON")
    parser.add_argument("--plot", type=output_file, help="PNG file to write")
    parser.add_argument("--timeline", type=output_file, help="PNG file to write: what SMs do in a persistent step")
    parser.add_argument("--tokens", type=whole(1, 16), default=8, help="that the step of --timeline reads")
    return parser


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
