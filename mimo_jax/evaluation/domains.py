"""Acceptance by domain: code, prose, chat turns, calls of tools, repetitive text; of any checkpoint and drafter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimo_jax.checkpoint.files.tensorfile import load_toml
from mimo_jax.cli.plots import save_figure
from mimo_jax.decode.sampling import Sampled, strategy_at
from mimo_jax.errors import UserError
from mimo_jax.evaluation.acceptance import continue_all, is_degenerate, measure
from mimo_jax.evaluation.entropy_bound import entropy_per_token
from mimo_jax.generation import encode_prompt
from mimo_jax.loading import Model

PROMPTS = Path(__file__).with_suffix(".toml")
_MAX_BYTES = 1 << 24
_KEYS = ("texts", "messages", "tools")

Domains = dict[str, list[list[int]]]  # name -> prompts, as token ids


def read_domains(path: Path, model: Model, directory: Path) -> Domains:
    """The prompts of a TOML file: a table for each domain, with `texts`, or `messages` and perhaps `tools`."""
    tables = load_toml(path, _MAX_BYTES)
    if not tables:
        raise UserError(f"{path}: has no domain; expected tables with texts or messages")
    return {name: _prompts_of(table, f"{path}: {name}", model, directory) for name, table in tables.items()}


def _prompts_of(table: Any, where: str, model: Model, directory: Path) -> list[list[int]]:
    if not isinstance(table, dict) or table.keys() - set(_KEYS) or ("texts" in table) == ("messages" in table):
        raise UserError(f"{where}: expected a table with texts, or with messages and perhaps tools")
    given = table.get("texts", table.get("messages"))
    if not isinstance(given, list) or len(given) < 2:
        raise UserError(f"{where}: expected a list of two prompts or more")
    if "texts" in table:
        if not all(isinstance(text, str) for text in given):
            raise UserError(f"{where}: texts must be strings")
        return [list(encode_prompt(model, text).ids) for text in given]
    from mimo_jax.serving.messages import checked_tools, normalized
    from mimo_jax.serving.template import ChatTemplate

    template, tools = ChatTemplate.load(directory, model.tokenizer), checked_tools(table.get("tools"))
    return [list(template.render(normalized(messages), tools).ids) for messages in given]


def study(model: Model, domains: Domains, temperatures: list[float], max_tokens: int) -> Iterator[dict[str, Any]]:
    """A record for each domain and temperature: acceptance over all texts, how many are loops, the target's entropy."""
    for temperature in temperatures:
        strategy = strategy_at(temperature)
        drawn = strategy if isinstance(strategy, Sampled) else Sampled(1.0)
        for name, prompts in domains.items():
            results = continue_all(model, prompts, strategy, max_tokens, len(prompts), f"{name} T={temperature}")
            yield {
                "domain": name,
                "temperature": temperature,
                "loops": sum(is_degenerate(result.tokens) for result in results),
                "nats_per_token": entropy_per_token(model, prompts, results, drawn),
                **dataclasses.asdict(measure(results)),
            }


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Tokens per round by domain, and beside it by the target's entropy there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    temperatures = sorted({row["temperature"] for row in rows})
    width = 0.8 / len(temperatures)
    for index, temperature in enumerate(temperatures):
        chosen = [row for row in rows if row["temperature"] == temperature]
        places = [domains.index(row["domain"]) + (index - (len(temperatures) - 1) / 2) * width for row in chosen]
        lengths, errors = zip(*((row["tokens_per_round"], row["half_width"]) for row in chosen))
        label = f"T = {temperature}"
        left.bar(places, lengths, width, yerr=errors, label=label, error_kw={"linewidth": 1})
        right.errorbar([row["nats_per_token"] for row in chosen], lengths, yerr=errors, fmt="o", capsize=3, label=label)
        for row in chosen:
            right.annotate(row["domain"], (row["nats_per_token"], row["tokens_per_round"]), fontsize="small")
    left.axhline(1, color="grey", linewidth=0.8)
    left.set_xticks(range(len(domains)), domains)
    left.set(ylabel="tokens per round (95 % interval)")
    left.legend(loc="upper left")
    right.set(xlabel="the target's entropy, nats per token", ylabel="tokens per round")
    save_figure(figure, out)
