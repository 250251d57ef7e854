"""What a plan says, as one record and as text and a picture of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mimo_jax.cli.plots import save_figure
from mimo_jax.planning.compiled import NEGLIGIBLE, Program
from mimo_jax.planning.forecast import ACCEPTANCES, BOUNDS, all_reduces, roofline_seconds, tokens_per_second
from mimo_jax.planning.machines import Target
from mimo_jax.planning.traffic import Plan, cache_bytes, resident_weights, round_flops, round_reads

CONTEXTS = (131_072, 262_144, 1_048_576)


def record_of(plan: Plan, target: Target, context: int, programs: dict[str, Program]) -> dict[str, Any]:
    """Everything in bytes, seconds and tokens per second, per device where that makes sense."""
    weights = resident_weights(plan)
    temporaries = max((program.temporaries for program in programs.values()), default=0)
    free = target.gpu.memory - sum(weights.values()) - temporaries
    rounds = {"plain": (1, False), "drafted": (plan.drafter.block_size, True)}
    return {
        "target": str(target),
        "layout": dataclasses.asdict(plan.shape),
        "context": context,
        "memory": target.gpu.memory,
        "weights": weights,
        "temporaries": temporaries if programs else None,
        "cache": {str(size): cache_bytes(plan, size) for size in CONTEXTS},
        "largest_context": max((size for size in CONTEXTS if cache_bytes(plan, size) <= free), default=None),
        "reads": {name: round_reads(plan, tokens, context, draft) for name, (tokens, draft) in rounds.items()},
        "flops": {name: round_flops(plan, tokens, context) for name, (tokens, _) in rounds.items()},
        "all_reduces": {name: all_reduces(plan, draft) for name, (_, draft) in rounds.items()},
        "roofline_seconds": {
            name: roofline_seconds(plan, target, tokens, context, draft) for name, (tokens, draft) in rounds.items()
        },
        "projected_tokens_per_second": {
            str(accepted): {
                name: tokens_per_second(plan, target, context, accepted, assumed) for name, assumed in BOUNDS.items()
            }
            for accepted in ACCEPTANCES
        },
        "assumptions": {name: dataclasses.asdict(assumed) for name, assumed in BOUNDS.items()},
        "programs": {
            name: dataclasses.asdict(program) | {"beyond": program.beyond} for name, program in programs.items()
        },
    }


def text_of(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [f"{record['target']}, {record['layout']}: per device, in GB"]
    lines += _table("weights", record["weights"])
    lines += [_row(f"cache of {int(size) // 1024}k", nbytes) for size, nbytes in record["cache"].items()]
    if record["temporaries"] is not None:
        lines.append(_row("temporaries", record["temporaries"]))
    largest = record["largest_context"]
    fits = f"{largest // 1024}k" if largest else "not even 128k"
    lines.append(f"  of {record['memory'] / 1e9:.0f}; the largest context that fits: {fits}")
    for name, reads in record["reads"].items():
        milliseconds, flops = record["roofline_seconds"][name] * 1e3, record["flops"][name] / 1e9
        lines.append(
            f"a {name} round after {record['context'] // 1024}k tokens: {milliseconds:.2f} ms at full bandwidth, "
            f"{flops:.1f} GFLOP, {record['all_reduces'][name]} all-reduces"
        )
        lines += _table("reads", reads)
    for name, program in record["programs"].items():
        lines += _program_lines(name, program)
    low, high = (
        f"{bound['efficiency']:.0%} of the bandwidth and {bound['all_reduce'] * 1e6:.1f} us per all-reduce"
        for bound in record["assumptions"].values()
    )
    lines.append(f"projected, not measured; from {low} to {high}; experts routed evenly:")
    for accepted, speeds in record["projected_tokens_per_second"].items():
        lines.append(f"  {float(accepted):5.2f} tokens per round {speeds['low']:8.0f} to {speeds['high']:.0f} tokens/s")
    return "\n".join(lines)


def _table(title: str, parts: dict[str, float]) -> list[str]:
    rows = sorted(parts.items(), key=lambda row: -row[1])
    return [_row(name, nbytes) for name, nbytes in [*rows, (f"{title}, in all", sum(parts.values()))]]


def _row(name: str, nbytes: float) -> str:
    return f"  {name:<18}{nbytes / 1e9:11.3f}"


def _program_lines(name: str, program: dict[str, Any]) -> list[str]:
    lines = [
        f"compiled {name} ({program['seconds']:.0f} s): arguments {program['arguments'] / 1e9:.2f} GB, temporaries "
        f"{program['temporaries'] / 1e9:.2f} GB"
    ]
    for kind, (count, nbytes) in sorted(program["collectives"].items()):
        lines.append(f"  {count:6.0f} x {kind} = {nbytes / 1e6:.2f} MB")
    for place, nbytes in sorted(program["beyond"].items(), key=lambda row: -row[1]):
        lines.append(f"  {nbytes / 1e9:8.3f} GB written beyond the formulas by {place}")
    rest = sum(program["expansions"].values()) - sum(program["beyond"].values())
    lines.append(
        f"  {rest / 1e9:8.3f} GB in all by others, each below {NEGLIGIBLE:.0%} of {program['needed'] / 1e9:.1f} GB read"
    )
    return lines


def plot(record: dict[str, Any], out: Path) -> None:
    """Where a round's time goes at full bandwidth, and what the all-reduces add."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    total = sum(record["reads"]["drafted"].values())
    seconds = record["roofline_seconds"]["drafted"]
    names = [name for name, size in record["reads"]["drafted"].items() if size > total / 500]
    for row, kind in enumerate(record["reads"]):
        left = 0.0
        for index, name in enumerate(names):
            width = record["reads"][kind].get(name, 0.0) / total * seconds * 1e3
            axes.barh(row, width, left=left, color=f"C{index}", label=name if row else None)
            left += width
        width = record["all_reduces"][kind] * record["assumptions"]["high"]["all_reduce"] * 1e3
        axes.barh(row, width, left=left, color="lightgrey", label="all-reduces" if row else None)
    axes.set_yticks(range(len(record["reads"])), list(record["reads"]))
    axes.set(xlabel="ms at full bandwidth (projected)", title=f"{record['target']}: where a round's time goes")
    axes.legend(fontsize="small", ncols=2)
    save_figure(figure, out)
