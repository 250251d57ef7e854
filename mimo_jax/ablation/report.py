"""What a study found: each arm beside its control, as a table, a record and a picture, with intervals.

Arms and control share seeds, so differences are taken seed by seed: what a seed does to both drops out. Intervals are
95 %, by Student's t over seeds; with one seed there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.ablation.runner import Record, named
from mimo_jax.ablation.study import Study
from mimo_jax.cli.plots import save_figure

Row = dict[str, Any]


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def rows_of(study: Study, records: list[Record]) -> list[Row]:
    """A row for each arm that was run and each metric: its mean, and its difference from the control."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        found.setdefault(named(record["arm"]), {})[record["seed"]] = record["metrics"]
    control = found.get(named(study.control_arm), {})
    rows = []
    for arm in study.arms:
        own = found.get(named(arm), {})
        for metric in study.metrics:
            values = [metrics[metric] for metrics in own.values()]
            if not values:
                continue
            shared = [own[seed][metric] - control[seed][metric] for seed in own.keys() & control.keys()]
            is_control = arm == study.control_arm
            rows.append(
                {
                    "arm": arm,
                    "is_control": is_control,
                    "metric": metric,
                    "seeds": len(values),
                    "mean": float(np.mean(values)),
                    "half_width": half_width(values),
                    "difference": None if is_control or not shared else float(np.mean(shared)),
                    "difference_half_width": None if is_control else half_width(shared),
                }
            )
    return rows


def table_of(study: Study, rows: list[Row]) -> str:
    """The rows for people, in Markdown."""
    lines = [f"# {study.title}", "", f"{study.what.about[0].upper()}{study.what.about[1:]}.", ""]
    for metric in study.metrics:
        lines += [f"**{metric}**: {study.what.metrics[metric]}.", ""]
        lines += ["| arm | seeds | mean | from the control |", "|---|---|---|---|"]
        for row in rows:
            if row["metric"] == metric:
                mean = _with_interval(row["mean"], row["half_width"])
                change = (
                    "control"
                    if row["is_control"]
                    else _with_interval(row["difference"], row["difference_half_width"], "+")
                )
                lines.append(f"| {_varied(study, row)} | {row['seeds']} | {mean} | {change} |")
        lines.append("")
    return "\n".join(lines)


def _with_interval(value: float | None, half: float | None, sign: str = "") -> str:
    if value is None:
        return "no seed in common"
    return f"{value:{sign}.4g}" + ("" if half is None else f" ± {half:.2g}")


def _varied(study: Study, row: Row) -> str:
    """An arm by what sets it apart; the control by all of it."""
    if row["is_control"] or study.crossed:
        return named(row["arm"])
    return named({name: value for name, value in row["arm"].items() if value != study.control_arm[name]})


def plot(study: Study, rows: list[Row], out: Path) -> None:
    """A dot with its interval for each arm, one panel for each metric; the line is the control."""
    from matplotlib.figure import Figure

    height = 1.5 + 0.35 * len(study.arms)
    figure = Figure(figsize=(5.5 * len(study.metrics), height), layout="constrained")
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(study.metrics))), study.metrics):
        chosen = [row for row in rows if row["metric"] == metric]
        for place, row in enumerate(chosen):
            color = "black" if row["is_control"] else "C0"
            axes.errorbar(row["mean"], place, xerr=row["half_width"] or 0, fmt="o", color=color, capsize=3)
            if row["is_control"]:
                axes.axvline(row["mean"], color="grey", linewidth=0.8)
        axes.set_yticks(range(len(chosen)), [_varied(study, row) for row in chosen])
        axes.invert_yaxis()
        axes.set(xlabel=f"{metric} (95 % over seeds)")
    figure.suptitle(study.title)
    save_figure(figure, out)
