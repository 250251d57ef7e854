"""Studies: what is refused before anything runs, which arms a study has, resuming, budgets, intervals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from mimo_jax.ablation import report, runner
from mimo_jax.ablation.experiments import EXPERIMENTS, Choice, Experiment, Real, Whole
from mimo_jax.ablation.study import Study, read_study
from mimo_jax.errors import UserError

STUDIES = sorted((Path(__file__).parents[2] / "scripts" / "studies").glob("*.toml"))
GIVEN = {
    "title": "t",
    "experiment": "toy",
    "factors": {"slope": [1.0, 2.0], "kind": ["a", "b", "c"]},
    "seeds": [0, 1, 2],
    "metrics": ["height"],
    "minutes": 1,
}
TOY = """
title = "A toy"
experiment = "toy"
seeds = [0, 1]
metrics = ["height"]
minutes = 1
[factors]
slope = [1.0, 2.0]
"""


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> list:
    """An experiment whose result is known: height = slope x (1 + seed), 10 more for kind b. Returns the calls."""
    calls = []

    class Toy(Experiment):
        @property
        def _home(self):
            class Home:
                @staticmethod
                def run(settings, seed, folder):
                    calls.append((settings, seed))
                    height = settings["slope"] * (1 + seed) + 10 * (settings["kind"] == "b")
                    return {"height": math.nan if settings["steps"] == 13 else height}

            return Home

    rules = {"slope": Real(1.0, 0, 100), "kind": Choice("a", ("a", "b", "c")), "steps": Whole(5, 1, 100)}
    monkeypatch.setitem(EXPERIMENTS, "toy", Toy("a toy", "toy", rules, {"height": "of it"}))
    return calls


def study(**changes) -> Study:
    return Study(**{**GIVEN, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experiment": "toys"}, "experiment='toys' is unknown"),
        ({"factors": {"slop": [1, 2]}}, "factors.slop is unknown; known: slope, kind, steps"),
        ({"factors": {}}, "factors is empty"),
        ({"factors": {"slope": [1.0]}}, r"factors.slope=\[1.0\] must be a list of two values"),
        ({"factors": {"slope": [1.0, 200.0]}}, "slope=200.0 must be a number in 0..100"),
        ({"factors": {"kind": ["a", "d"]}}, "kind='d' must be one of a, b, c"),
        ({"base": {"steps": 0}}, "steps=0 must be a whole number in 1..100"),
        ({"base": {"slope": 1.0}}, "slope is both in base and in factors"),
        ({"base": {"stride": 1}}, "base.stride is unknown"),
        ({"metrics": ["width"]}, "metric 'width' does not exist; toy has height"),
        ({"metrics": []}, r"metrics=\[\] must be a list"),
        ({"minutes": 0}, "minutes=0 must be a number in 0.01"),
        ({"seeds": []}, r"seeds=\[\] must be a list"),
        ({"seeds": [1, 1]}, "must be a list of different"),
        ({"seeds": [-1]}, "must be a whole number in 0"),
        ({"control": {"kind": "z"}}, "control.kind='z' must be one of"),
        ({"control": {"steps": 5}}, "control.steps is unknown; known: slope, kind"),
    ],
)
def test_what_cannot_be_run_is_named(changes: dict, words: str, toy: list) -> None:
    """One line that names the field, the value and the rule; and nothing has run."""
    with pytest.raises(UserError, match=words):
        study(**changes)
    assert not toy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title = ", "Invalid value"),
        (TOY.replace("minutes = 1", ""), "missing minutes"),
        ("more = 1\n" + TOY, "more is unknown"),
        (TOY.replace("[factors]\nslope = [1.0, 2.0]", "factors = 3"), "factors=3 must be a table"),
        (TOY.replace("height", "width"), "metric 'width' does not exist"),
    ],
)
def test_a_broken_file_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}: .*{words}"):
        read_study(path)


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_shipped_studies_are_studies(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of scripts/studies/ name settings that exist; the folder of the corpus is not asked for here."""
    monkeypatch.setattr("mimo_jax.ablation.experiments.Folder.check", lambda *_: None)
    monkeypatch.setattr("mimo_jax.ablation.drafter.check", lambda settings: None)
    found = read_study(path)
    assert len(found.arms) >= 3 and set(found.metrics) <= set(found.what.metrics)


def test_arms_differ_from_the_control_in_one_factor_or_are_crossed() -> None:
    """Each arm once, the control first; the control is the first values unless it is named."""
    assert study().arms == [
        {"slope": 1.0, "kind": "a"},
        {"slope": 2.0, "kind": "a"},
        {"slope": 1.0, "kind": "b"},
        {"slope": 1.0, "kind": "c"},
    ]
    assert len(study(crossed=True).arms) == 6
    assert study(control={"kind": "c"}).arms[0] == {"slope": 1.0, "kind": "c"}


def test_a_study_is_resumed(tmp_path: Path, toy: list) -> None:
    """What has been run is not run again, what was added is; a line holds all that is needed to repeat the run."""
    runner.run_study(study(), tmp_path, lambda line: None)
    assert len(toy) == 12
    records = runner.run_study(study(seeds=[0, 1, 2, 3]), tmp_path, lambda line: None)
    assert len(toy) == len(records) == 16
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert lines == records
    again = EXPERIMENTS["toy"].run(lines[-1]["settings"], lines[-1]["seed"], tmp_path)
    assert again == lines[-1]["metrics"]


def test_a_budget_ends_a_study_and_a_larger_one_goes_on(tmp_path: Path, toy: list, monkeypatch) -> None:
    """A run that takes half a minute: a budget of one allows two, which a later call counts."""
    clock = iter(range(0, 10**6, 30))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(clock))
    said: list[str] = []
    assert len(runner.run_study(study(minutes=1), tmp_path, said.append)) == 2
    assert "2 of 12 runs are made" in said[-1]
    assert len(runner.run_study(study(minutes=1), tmp_path, said.append)) == 2
    assert len(runner.run_study(study(minutes=2), tmp_path, said.append)) == 4


def test_a_run_that_fails_to_be_a_number_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="height is nan"):
        runner.run_study(study(base={"steps": 13}), tmp_path, lambda line: None)
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(UserError, match="line 1 is no run"):
        runner.run_study(study(), tmp_path, lambda line: None)


def test_intervals_are_students(tmp_path: Path) -> None:
    """Means and paired differences with scipy's interval; what all arms of a seed share drops out of the difference."""
    records = runner.run_study(study(), tmp_path, lambda line: None)
    rows = {runner.named(row["arm"]): row for row in report.rows_of(study(), records)}
    control, steep, other = rows["slope 1.0, kind a"], rows["slope 2.0, kind a"], rows["slope 1.0, kind b"]
    low, high = scipy.stats.t.interval(0.95, 2, loc=2.0, scale=scipy.stats.sem([1.0, 2.0, 3.0]))
    assert control["mean"] == 2.0 and control["difference"] is None
    np.testing.assert_allclose(control["half_width"], (high - low) / 2)
    assert other["difference"] == 10.0 and other["difference_half_width"] == 0.0
    assert steep["difference"] == 2.0
    np.testing.assert_allclose(steep["difference_half_width"], control["half_width"])


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    records = runner.run_study(study(seeds=[4]), tmp_path, lambda line: None)
    rows = report.rows_of(study(seeds=[4]), records)
    assert all(row["half_width"] is None and row["difference_half_width"] is None for row in rows)
    table = report.table_of(study(seeds=[4]), rows)
    assert "| kind b | 1 | 15 | +10 |" in table
    report.plot(study(seeds=[4]), rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
