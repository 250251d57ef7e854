"""What `evaluate.py acceptance` reports is what the loop counted."""

import dataclasses

import numpy as np
import pytest

from mimo_jax.evaluation.acceptance import is_degenerate, measure, plot, prompts_of, summaries
from mimo_jax.generation import Acceptance, Result


def result(rounds: int, tokens: int, tested: list[int], accepted: list[int]) -> Result:
    return Result("", [], "length", Acceptance(rounds, tokens, tested, accepted), None)  # type: ignore[arg-type]


def test_totals_are_weighted_by_rounds():
    """Tokens per round is the ratio of totals, and a position's acceptance is conditional on being tested."""
    found = measure(
        [result(10, 40, [10, 8], [8, 6]), result(30, 60, [30, 12], [12, 3]), result(20, 50, [20, 5], [5, 0])]
    )
    assert found.tokens_per_round == pytest.approx(150 / 60)
    assert found.conditional == pytest.approx([25 / 60, 9 / 25])
    assert found.block_share == pytest.approx(9 / 60)
    assert found.half_width > 0


def test_the_interval_covers_the_truth_at_its_rate():
    """About 95 % of the intervals over random samples hold the true ratio."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        rounds = rng.integers(20, 60, 60)
        rates = rng.gamma(20, 0.2, 60)
        found = measure([result(n, round(n * rate), [1], [1]) for n, rate in zip(rounds, rates)])
        hits += abs(found.tokens_per_round - 4.0) < found.half_width
    assert 0.91 < hits / 400 < 0.98


def test_loops_are_told_from_text():
    """A text that repeats a phrase is degenerate; one whose 4-grams are mostly new is not."""
    assert is_degenerate([1, 2, 3, 4, 5] * 20)
    assert not is_degenerate(np.random.default_rng(0).integers(0, 100, 100).tolist())
    assert not is_degenerate(list(range(10)) * 2)


def test_prompts_are_spread_over_the_held_out_text():
    """The first and the last prompt touch both ends, and all have the asked length."""
    prompts = prompts_of(np.arange(1000), 5, 100)
    assert [prompt[0] for prompt in prompts] == [0, 225, 450, 675, 900]
    assert all(len(prompt) == 100 for prompt in prompts)


def test_loops_are_reported_apart_and_plotted(tmp_path):
    """Loops count among all texts only; the rows that say so are what the plot draws."""
    loop = dataclasses.replace(result(1, 8, [1], [1]), tokens=[1, 2] * 20)
    texts = [dataclasses.replace(result(4, 8, [4], [2]), tokens=list(range(40))) for _ in range(3)]
    rows = summaries([loop, *texts])
    assert [(row["subset"], row["texts"]) for row in rows] == [("all", 4), ("no loops", 3)]
    assert [row["tokens_per_round"] for row in rows] == pytest.approx([32 / 13, 2])
    pytest.importorskip("matplotlib")
    plot([{"drafter": "a", "temperature": t} | row for t in (0.0, 1.0) for row in rows], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_nothing_but_loops_is_drawn(tmp_path):
    """Small models may write only loops: the finished result still gets its picture, whatever its file is called."""
    pytest.importorskip("matplotlib")
    loop = dataclasses.replace(result(1, 8, [1], [1]), tokens=[1, 2] * 20)
    rows = summaries([loop, loop])
    assert [row["subset"] for row in rows] == ["all"]
    plot([{"drafter": "a", "temperature": 0.0} | row for row in rows], tmp_path / "picture.x")
    assert (tmp_path / "picture.x").read_bytes().startswith(b"\x89PNG")
