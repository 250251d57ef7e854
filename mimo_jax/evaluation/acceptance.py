"""How much of what a drafter proposes the target accepts, on prompts neither was trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.checkpoint.dflash import has_extras
from mimo_jax.cli.plots import save_figure
from mimo_jax.cli.progress import progress
from mimo_jax.decode.sampling import Sampled, Strategy, strategy_at
from mimo_jax.drafters.autoregressive import AutoregressiveDrafter
from mimo_jax.drafters.mtp import MtpDrafter
from mimo_jax.drafters.prompt_lookup import PromptLookupDrafter
from mimo_jax.errors import UserError, check_whole
from mimo_jax.evaluation.entropy_bound import entropy_per_token, order_blind_bound
from mimo_jax.evaluation.ratios import ratio
from mimo_jax.generation import Request, Result, generate_batch
from mimo_jax.loading import Model, with_drafter

NGRAM = 4
LEAST_DISTINCT = 0.5  # a text with fewer distinct 4-grams than this share is a loop


@dataclasses.dataclass(frozen=True)
class Measured:
    """Tokens per round over `texts` continuations with the half-width of its 95 % interval, and acceptance by draft
    position.
    """

    texts: int
    rounds: int
    tokens_per_round: float
    half_width: float
    conditional: list[float]  # draft position m: accepted / tested
    block_share: float  # rounds whose whole block was accepted


def drafting_models(plain: Model, drafters: dict[str, Path], chains: dict[str, Path]) -> dict[str, Model]:
    """`plain`, then the same target with each drafter to be measured, by name: controls, blocks, chains.

    A drafter with extras is measured without them, too: that is what other engines get.
    The native step has blocks only: MTP layers are left out beside it, and chains are refused.
    """
    models = {"plain": plain, "prompt lookup": dataclasses.replace(plain, drafter=PromptLookupDrafter())}
    if plain.config.mtp_layers and plain.layout != "native":
        models["MTP layer"] = dataclasses.replace(plain, drafter=MtpDrafter(plain.config))
    for name, folder in drafters.items():
        models[name] = with_drafter(plain, folder)
        if has_extras(folder):
            models[f"{name}, no extras"] = with_drafter(plain, folder, extras=False)
    return models | {name: with_drafter(plain, folder, AutoregressiveDrafter) for name, folder in chains.items()}


def prompts_of(tokens: np.ndarray, count: int, length: int) -> list[list[int]]:
    """`count` evenly spaced prompts of `length` held-out tokens."""
    check_whole("acceptance", 1, prompts=count, prompt_tokens=length)
    if (len(tokens) - length) < count:
        raise UserError(f"acceptance: {count} prompts of {length} tokens asked for, {len(tokens)} tokens are held out")
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return [tokens[start : start + length].astype(int).tolist() for start in starts]


def is_degenerate(tokens: list[int]) -> bool:
    """Whether a text repeats itself: under half of its 4-grams are distinct. Any drafter predicts a loop."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return bool(grams) and len(set(grams)) < LEAST_DISTINCT * len(grams)


def continue_all(
    model: Model, prompts: list[list[int]], strategy: Strategy, max_tokens: int, rows: int, label: str
) -> list[Result]:
    """Every prompt's continuation, `rows` at a time; prompt i has seed i."""
    results: list[Result] = []
    with progress(label, len(prompts)) as bar:
        for first in range(0, len(prompts), rows):
            chosen = prompts[first : first + rows]
            padded = chosen + [chosen[-1]] * (rows - len(chosen))  # one program for the last, shorter batch too
            requests = [Request(prompt, strategy, max_tokens, first + row) for row, prompt in enumerate(padded)]
            results += generate_batch(model, requests)[: len(chosen)]
            bar.advance(len(chosen))
    return results


def measure(results: list[Result]) -> Measured:
    """Totals over texts; the interval is that of a ratio estimator over texts."""
    rounds = np.array([result.acceptance.rounds for result in results], np.float64)
    tokens = np.array([result.acceptance.tokens for result in results], np.float64)
    tested = np.sum([result.acceptance.tested for result in results], axis=0)
    accepted = np.sum([result.acceptance.accepted for result in results], axis=0)
    tokens_per_round, error = ratio(tokens, rounds)
    return Measured(
        texts=len(results),
        rounds=int(rounds.sum()),
        tokens_per_round=tokens_per_round,
        half_width=1.96 * error,
        conditional=[float(a / t) if t else math.nan for a, t in zip(accepted, tested)],
        block_share=float(accepted[-1] / rounds.sum()) if len(accepted) else 0.0,
    )


def summaries(results: list[Result]) -> list[dict[str, Any]]:
    """`measure` over all texts, and over those that are no loops, where there are at least two; "subset" says which."""
    subsets = {"all": results, "no loops": [result for result in results if not is_degenerate(result.tokens)]}
    return [{"subset": name, **vars(measure(chosen))} for name, chosen in subsets.items() if len(chosen) > 1]


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Tokens per round by drafter and temperature, and acceptance by draft position at the lowest one; no loops.

    Each row is one of `summaries` with its "drafter" and "temperature".
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["subset"] == "no loops"] or rows  # small models may write nothing but loops
    temperatures = sorted({row["temperature"] for row in rows})
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = 0.8 / len(temperatures)
    for index, temperature in enumerate(temperatures):
        chosen = [row for row in rows if row["temperature"] == temperature]
        places = [drafters.index(row["drafter"]) + (index - (len(temperatures) - 1) / 2) * width for row in chosen]
        lengths, errors = zip(*((row["tokens_per_round"], row["half_width"]) for row in chosen))
        left.bar(places, lengths, width, yerr=errors, label=f"T = {temperature}", error_kw={"linewidth": 1})
    left.axhline(1, color="grey", linewidth=0.8)
    left.set_xticks(range(len(drafters)), drafters, rotation=30, ha="right")
    left.set(ylabel="tokens per round (95 % interval)", title="accepted drafts and the target's own token")
    left.legend()
    for row in rows:
        by_position = row["conditional"]
        if row["temperature"] == temperatures[0] and by_position:
            right.plot(range(1, len(by_position) + 1), by_position, marker=".", linewidth=1, label=row["drafter"])
    right.set(xlabel="draft position", ylabel="acceptance, all before it accepted", title=f"T = {temperatures[0]}")
    right.legend(fontsize="small")
    save_figure(figure, out)


def study(
    plain: Model,
    models: dict[str, Model],
    prompts: list[list[int]],
    temperatures: list[float],
    max_tokens: int,
    rows: int,
) -> Iterator[dict[str, Any]]:
    """Every model on every prompt, one record for each model and temperature, in `rows` at a time.

    `same_as_plain` counts texts that equal those of `models["plain"]`; "subsets" are `summaries`. After those of a
    temperature comes a record of the target's own uncertainty, if tokens were sampled.
    """
    for temperature in temperatures:
        strategy, expected = strategy_at(temperature), []
        for name, model in models.items():
            results = continue_all(model, prompts, strategy, max_tokens, rows, f"{name} T={temperature}")
            expected = expected or results
            same = sum(one.tokens == other.tokens for one, other in zip(expected, results))
            about = {"drafter": name, "temperature": temperature, "same_as_plain": same}
            yield {**about, "texts": len(results), "subsets": summaries(results)}
        if isinstance(strategy, Sampled):
            prefixes = prompts[:: max(1, len(prompts) // 20)]
            yield {
                "temperature": temperature,
                "nats_per_token": entropy_per_token(plain, prompts, expected, strategy),
                "order_blind_bound": order_blind_bound(plain, prefixes, strategy),
            }
