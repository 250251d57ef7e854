"""The persistent decode step as a table of work: how long a round takes, and what it waits for.

Projected throughout, from what rows took on one H200: `pallas_kernels.decode_step.simulate` says how much.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimo_jax.cli.plots import save_figure
from mimo_jax.config.geometry import target_of
from mimo_jax.errors import UserError
from mimo_jax.planning.machines import Target
from mimo_jax.planning.traffic import Plan
from pallas_kernels.decode_step import (
    END,
    HOPPER,
    ROLES,
    Costs,
    Timeline,
    assigned_rows,
    layer_of,
    sensitivity,
    shard_of,
    step_phases,
    timeline_of,
)

DRAWN_LAYERS = range(1, 4)
DRAWN_SMS = 12  # of the first device; attention to a window takes fewer than that, the others do the same on all


def step_timeline(plan: Plan, target: Target, tokens: int) -> Timeline:
    """A round of the target without its drafter, whose tokens all choose other experts.

    Devices do the same at the same time. So two of them are simulated, each with its share of the model: they show
    every wait for a peer.
    """
    devices, gpu = plan.shape.tensor, target.gpu
    if plan.shape.expert > 1:
        raise UserError(f"plan: --timeline has no experts in groups; --expert-parallel {plan.shape.expert} must be 1")
    rows = assigned_rows(step_phases(shard_of(target_of(plan.config), devices), tokens), min(devices, 2), gpu.sms)
    return timeline_of(rows, costs_of(target))


def costs_of(target: Target) -> Costs:
    """Those of an H200's SMs, at the target's bandwidth."""
    return dataclasses.replace(HOPPER, bandwidth=target.gpu.bandwidth / 1e6 / target.gpu.sms)


def record_of(timeline: Timeline, tokens: int, target: Target) -> dict[str, Any]:
    """Microseconds, all projected; `saved` is by how much a round would be shorter if something were better."""
    layers = {str(layer): parts for layer, parts in sorted(timeline.exposed().items()) if layer != END}
    layers["end"] = timeline.exposed()[END]
    saved = sensitivity(timeline, costs_of(target))
    found = {"tokens": tokens, "round": timeline.round, "share_of_roofline": timeline.share}
    return {**found, "chain": layers, "saved": saved}


def text_of(record: dict[str, Any]) -> str:
    """The record for people; layers that are alike share a line."""
    lines = [
        f"the persistent step at an H200's costs (projected, not measured): {record['tokens']} tokens in "
        f"{record['round'] / 1e3:.2f} ms, {record['share_of_roofline']:.0%} of the weights' roofline",
        "what a layer takes, in us along the chain that the round's length is made of:",
    ]
    lines += [f"  {name:<14}{parts}" for name, parts in _alike(record["chain"])]
    lines += ["what a round would save, in us:"]
    lines += [f"  {saved:7.1f}  {name}" for name, saved in sorted(record["saved"].items(), key=lambda one: -one[1])]
    return "\n".join(lines)


def _alike(chain: dict[str, dict[str, float]]) -> Iterator[tuple[str, str]]:
    """Names of layers, and what their parts of the chain have in common."""
    groups: dict[str, list[str]] = {}
    for layer, parts in chain.items():
        ordered = sorted(parts.items(), key=lambda part: (-round(part[1], 1), part[0]))
        text = ", ".join(f"{name} {time:.1f}" for name, time in ordered if time >= 0.05)
        groups.setdefault(f"{sum(parts.values()):7.1f}: {text}", []).append(layer)
    for text, layers in groups.items():
        yield layers[0] if len(layers) == 1 else f"{layers[0]}.. ({len(layers)})", text


def draw_lanes(axes: Any, timeline: Timeline, lanes: list[tuple], names: list[str], until: float = math.inf) -> None:
    """What the workers of `lanes` do: a bar for each row that starts before `until`, coloured by its kind."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    bars: dict[tuple, list[tuple[float, float]]] = {}
    for row, worker, start, end in zip(timeline.rows, timeline.workers, timeline.starts, timeline.ends):
        if worker in lanes and start < until:
            bars.setdefault((lanes.index(worker), row.kind), []).append((start, end - start))
    kinds = sorted({kind for _, kind in bars})
    colors = {kind: colormaps["tab20"](index % 20) for index, kind in enumerate(kinds)}
    for (lane, kind), spans in bars.items():
        axes.broken_barh(spans, (lane - 0.4, 0.8), color=colors[kind], linewidth=0)
    patches = [Patch(color=colors[kind], label=kind.name) for kind in kinds]
    axes.figure.legend(handles=patches, ncols=8, loc="outside lower center", fontsize="small")
    axes.set_yticks(range(len(lanes)), names)
    axes.set(xlabel="us (projected)")


def draw(timeline: Timeline, out: Path) -> None:
    """What some SMs of a device do during a few layers: a lane for each role."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots()
    drawn: dict[tuple, list[tuple[float, float]]] = {}
    for row, start, end in zip(timeline.rows, timeline.starts, timeline.ends):
        device, sm, _ = row.worker
        if device == 0 and sm < DRAWN_SMS and layer_of(row) in DRAWN_LAYERS:
            drawn.setdefault(row.worker, []).append((start, end - start))
    for (_, sm, role), bars in drawn.items():
        lane = ROLES.index(role)
        axes.broken_barh(bars, (sm + lane / len(ROLES), 0.9 / len(ROLES)), color=f"C{lane}", linewidth=0)
    handles = [Patch(color=f"C{lane}", label=role) for lane, role in enumerate(ROLES)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(ROLES))
    axes.set_yticks(range(DRAWN_SMS))
    axes.set(
        xlabel="us of the round (projected)",
        ylabel="SM",
        title=f"Layers {DRAWN_LAYERS[0]} to {DRAWN_LAYERS[-1]} of the persistent step, at an H200's costs",
    )
    save_figure(figure, out)
