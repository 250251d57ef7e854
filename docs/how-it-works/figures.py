"""Draws the figures of docs/how-it-works/, from the code that they explain.

docs/how-it-works/figures.py                     # all, into docs/figures
docs/how-it-works/figures.py --only round mxfp4
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser
from mimo_jax.cli.plots import need_matplotlib, save_figure
from mimo_jax.cli.values import output_folder

KEPT, REFUSED, OWN, PLAIN = "#8fcf8f", "#f0a5a0", "#9ec3ee", "#eeeeee"


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def decode_round() -> Any:
    """Rounds of the bundled model as rows of tokens: kept, refused, the target's own."""
    import mimo_jax as mimo
    from mimo_jax.decode import loop
    from mimo_jax.decode.controls import Controls, stops_of
    from mimo_jax.decode.sampling import rows_of

    model = mimo.load(layout="dense", draft="dflash")
    ids = model.tokenizer.encode(
        "class Queue:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    )
    controls = Controls(rows_of([mimo.Greedy()]), stops_of([()]))
    caches = loop.prefill(model.decoder, model.weights, [ids], loop.capacity_for(len(ids) + 64))
    state = loop.start(model.decoder, *caches, np.array([64], np.int32), loop.row_keys([0]), controls)
    figure, axes = new_figure(10, 3)
    for number in range(6):
        drafts = loop.propose(model.decoder, model.weights, state, controls).tokens[0].tolist()
        before = int(state.counts[0])
        state = loop.decode(model.decoder, model.weights, state, controls, 1)
        made = state.output[0, before : int(state.counts[0])].tolist()
        for place, token in enumerate(drafts):
            _cell(axes, place, number, model.tokenizer.decode([token]), KEPT if place < len(made) - 1 else REFUSED)
        _cell(axes, 7.3, number, model.tokenizer.decode(made[-1:]), OWN)
    axes.set(xlim=(-0.5, 7.9), ylim=(5.6, -0.6), ylabel="round")
    axes.set_xticks([*range(7), 7.3], [*(f"draft {place + 1}" for place in range(7)), "own token"])
    return figure


def _cell(axes: Any, x: float, y: float, text: str, color: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color=color, linewidth=0))
    axes.text(x, y, repr(text)[1:-1], ha="center", va="center", fontsize=8, family="monospace")


def dflash() -> Any:
    """Which context and which rows of the block each row of a block sees, for a window of 10."""
    import jax.numpy as jnp

    from mimo_jax.modeling.dflash import context_visibility

    window, block, shown = 10, 8, 14
    anchor = shown  # the position after the context that is drawn
    rows, positions = anchor + jnp.arange(block)[None], jnp.arange(shown)[None]
    grid = np.ones((block, shown + block))  # the block sees itself, both ways
    grid[:, :anchor] = np.where(np.asarray(context_visibility(rows, positions, window)[0]), 0, np.nan)
    figure, axes = new_figure(9, 3.2)
    axes.imshow(grid, cmap="Paired", vmin=-0.5, vmax=11, aspect="auto")
    axes.set_yticks(range(block), ["anchor", *(f"draft {number}" for number in range(1, block))])
    axes.set_xticks([shown // 2, anchor, anchor + block // 2], ["context, as the target left it", "anchor", "masks"])
    axes.set_xticks(np.arange(shown + block) - 0.5, minor=True)
    axes.set_yticks(np.arange(block) - 0.5, minor=True)
    axes.grid(which="minor", color="white")
    axes.axvline(anchor - 0.5, color="black", linewidth=1)
    axes.set(title="what a row of the block attends to (a window of 10)")
    return figure


def verification() -> Any:
    """Two distributions over eight tokens, what they share, and what is drawn from when a draft is refused."""
    p = np.array([0.34, 0.22, 0.05, 0.14, 0.08, 0.02, 0.12, 0.03])
    q = np.array([0.22, 0.10, 0.25, 0.18, 0.03, 0.10, 0.05, 0.07])
    both = np.minimum(p, q)
    figure, axes = new_figure(8, 3)
    places = np.arange(len(p))
    axes.bar(places, both, color=KEPT, label=f"min(p, q): kept, {both.sum():.2f} in all")
    axes.bar(places, p - both, bottom=both, color=OWN, label="(p − q)⁺: drawn from instead")
    axes.bar(places, q - both, bottom=both, color=REFUSED, hatch="//", label="(q − p)⁺: refused")
    axes.set_xticks(places, [f"token {place}" for place in places])
    axes.set(ylabel="probability")
    axes.legend()
    return figure


def mxfp4() -> Any:
    """A block of 32 weights with the values that it can hold."""
    from pallas_kernels import mxfp4 as format

    block = np.random.default_rng(3).normal(0, 0.02, (1, 32)).astype(np.float32)
    codes, scales = format.quantize(block)
    rounded = format.decode(codes, scales)[0]
    levels = np.unique(format.decode(np.arange(32, dtype=np.uint8)[None] % 16, scales))
    figure, axes = new_figure(9, 3.2)
    axes.hlines(levels, -0.5, 31.5, color="lightgrey", linewidth=0.8)
    axes.vlines(range(32), block[0], rounded, color="C1", linewidth=1)
    axes.plot(block[0], "o", markersize=4, label="weight")
    axes.plot(rounded, "_", markersize=9, color="C1", label="rounded")
    axes.set(xlabel="weight of the block", title=f"shared scale 2^{int(scales[0, 0]) - 127}, rule even")
    axes.legend()
    return figure


def mesh() -> Any:
    """A layer as eight lanes that meet twice."""
    from matplotlib.patches import Rectangle

    figure, axes = new_figure(9, 3.2)
    stages = ((0, 1.6, "QKV", "C0"), (1.6, 1.2, "attention", "C1"), (2.8, 1.0, "output", "C2"))
    stages += ((4.6, 0.7, "router", "C3"), (5.9, 1.6, "gate, up", "C4"), (7.5, 1.0, "down", "C5"))
    for device in range(8):
        for start, width, name, color in stages:
            axes.add_patch(Rectangle((start, device + 0.1), width - 0.05, 0.8, color=color, alpha=0.5, linewidth=0))
            axes.text(start + width / 2, device + 0.5, name, ha="center", va="center", fontsize=7)
    for start, width, name in ((3.9, 0.6, "sum"), (5.35, 0.5, "gather"), (8.6, 0.6, "sum")):
        axes.add_patch(Rectangle((start, 0.05), width, 7.9, color="black", alpha=0.75 if name == "sum" else 0.3))
        axes.text(start + width / 2, 4, name, rotation=90, ha="center", va="center", color="white")
    axes.set(
        xlim=(0, 9.3),
        ylim=(8, 0),
        xticks=[],
        title="a layer of MiMo-V2 on eight devices; an eighth of each matrix on each",
    )
    axes.set_yticks(np.arange(8) + 0.5, [f"device {number}" for number in range(8)])
    return figure


def schedule() -> Any:
    """A block of eight on two CPU threads, at the simulator's costs."""
    from mimo_jax.config.geometry import target_of
    from mimo_jax.loading import BUNDLED, read_hf_config
    from pallas_kernels.decode_step import step_phases, timeline_of
    from pallas_kernels.decode_step.schedule import claimed_rows
    from pallas_kernels.decode_step.simulate import CPU

    rows = claimed_rows(step_phases(target_of(read_hf_config(BUNDLED)[0]), tokens=8))
    timeline = timeline_of(rows, CPU)
    lanes = sorted(set(timeline.workers))
    return _lanes(timeline, lanes, [f"thread {number}" for number in range(len(lanes))])


def hopper() -> Any:
    """Two SMs over four layers of V2.5-Pro, at an H200's costs."""
    from mimo_jax.config.geometry import target_of
    from mimo_jax.config.presets import preset
    from pallas_kernels.decode_step import HOPPER, ROLES, assigned_rows, shard_of, step_phases, timeline_of

    pro = target_of(preset("mimo-v2.5-pro"))
    phases = step_phases(shard_of(dataclasses.replace(pro, layers=pro.layers[:4]), 8), tokens=8)
    timeline = timeline_of(assigned_rows(phases, devices=2), HOPPER)
    lanes = [(0, sm, role) for sm in (0, 1) for role in ROLES]
    return _lanes(timeline, lanes, [f"SM {sm} {role}" for _, sm, role in lanes], until=320)


def _lanes(timeline: Any, lanes: list[tuple], names: list[str], until: float = math.inf) -> Any:
    from mimo_jax.planning.timeline import draw_lanes

    figure, axes = new_figure(11, 1.6 + 0.35 * len(lanes))
    draw_lanes(axes, timeline, lanes, names, until)
    return figure


FIGURES: dict[str, Callable[[], Any]] = {
    "round": decode_round,
    "dflash": dflash,
    "verification": verification,
    "mxfp4": mxfp4,
    "mesh": mesh,
    "schedule": schedule,
    "hopper": hopper,
}


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    need_matplotlib()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        save_figure(FIGURES[name](), args.out / f"{name}.png")
    print(json.dumps({"figures": [str(args.out / f"{name}.png") for name in args.only]}))


def parser() -> Parser:
    parser = Parser(description=__doc__)
    default = Path(__file__).resolve().parents[1] / "figures"
    parser.add_argument("--out", type=output_folder, default=str(default), help="folder (default: docs/figures)")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="which")
    return parser


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
