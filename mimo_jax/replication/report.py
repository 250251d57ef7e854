"""The report as one HTML page that loads nothing: verdict, claims, gates, tables, pictures."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from mimo_jax.replication.steps import Record, claims

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top }
.yes { color: #17692b } .no { color: #a3231f } .note { color: #666 } img { max-width: 100% }
"""


def verdict(report: Record) -> str:
    """One sentence."""
    steps, rows = report["steps"], claims(report["steps"])
    broken = [name for name in ("logits", "lossless") if steps.get(name, {}).get("passed") is False]
    device = steps.get("environment", {}).get("device", "this device")
    if broken:
        return f"Nothing can be said of speed: {' and '.join(broken)} failed, so this is not the model."
    speed = rows[0]
    if speed["measured"] is None:
        return "Not complete: run the command again, it goes on where it stopped."
    told = f"{speed['measured']:,.0f} tokens per second for one text on {device}"
    if not report["is_pro"]:
        return f"A trial of the kit, not of the claim: {report['model']} is another model. It measured {told}."
    return f"The claim {'holds' if speed['reached'] else 'does not hold'} here: {told}."


def html_of(report: Record) -> str:
    """The whole page."""
    steps = report["steps"]
    parts = [f"<h1>Replication: {_text(report['model'])}</h1>", f"<p><strong>{_text(verdict(report))}</strong></p>"]
    parts += ["<h2>Claims</h2>", _table([{**row, "reached": _yes(row["reached"])} for row in claims(steps)])]
    for name, record in steps.items():
        parts.append(f"<h2>{_text(name.capitalize())}</h2>")
        if name == "acceptance":
            parts.append(_picture(record["rows"]))
        parts.append(_table(record["rows"]) if "rows" in record else _table([_shown(record)]))
    title = f"<title>Replication: {_text(report['model'])}</title>"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{_STYLE}</style>'
    return head + "\n".join(parts) + "</html>\n"


def _shown(record: Record) -> Record:
    return {name: _yes(value) if name == "passed" else value for name, value in record.items()}


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "not measured"}[value]


def _table(rows: list[Record]) -> str:
    """Rows with columns of their own; one row alone stands upright."""
    if len(rows) == 1:
        body = "".join(f"<tr><th>{_text(name)}</th>{_cell(value)}</tr>" for name, value in rows[0].items())
        return f"<table>{body}</table>"
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(_cell(row.get(name, "")) for name in names) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    kind = {"yes": ' class="yes"', "no": ' class="no"', "not measured": ' class="note"'}.get(str(value), "")
    return f"<td{kind}>{_text(_spelt(value))}</td>"


def _spelt(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(_spelt, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _picture(rows: list[Record]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if not row["temperature"]:
            places = range(1, len(row["conditional"]) + 1)
            axes.plot(places, row["conditional"], marker=".", label=f"{row['domain']}: {row['tokens_per_round']:.2f}")
    axes.set(xlabel="draft position", ylabel="accepted, if all before were", ylim=(0, 1.02), title="greedy")
    axes.legend(title="tokens per round", fontsize="small")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="acceptance by draft position and domain" src="data:image/png;base64,{encoded}">'
