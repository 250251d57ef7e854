"""The replication kit: a dry run on the bundled model, what it goes on with, and what its verdicts are."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from mimo_jax.cli.guard import main_guard
from mimo_jax.loading import BUNDLED
from mimo_jax.replication import report, steps

ROOT = Path(__file__).parents[2]
SMALL = ("--prompts", "2", "--tokens", "8", "--contexts", "32", "4096", "--repeats", "1")


def command():
    spec = importlib.util.spec_from_file_location("replicate", ROOT / "scripts" / "replicate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the bundled model."""
    out = tmp_path_factory.mktemp("replication")
    command()([*SMALL, "--out", str(out)])
    return out


@pytest.fixture
def found(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_a_dry_run_does_every_step(found: dict) -> None:
    """Gates pass, each domain has its acceptance and speeds, and a context that does not fit is left out by name."""
    assert list(found["steps"]) == list(steps.STEPS)
    assert found["steps"]["checkpoint"]["verified"] is True
    assert found["steps"]["logits"]["passed"] and found["steps"]["logits"]["same best token"] > 0.9
    assert found["steps"]["lossless"] == {"passed": True, "same texts": 10, "of": 10}
    assert len(found["steps"]["acceptance"]["rows"]) == 2 * 5
    for row in found["steps"]["speed by domain"]["rows"]:
        low, high = row["drafted, lowest and highest"]
        assert 0 < low <= row["drafted, tokens per second"] <= high
    short, long = found["steps"]["speed by context"]["rows"]
    assert short["plain, tokens per second"] > 0 and long["left out"] == "the model's is 1024"


def test_gates_hold_on_a_mesh() -> None:
    """Shared by two devices, the model has the reference's logits, and drafted text is plain text."""
    kit = steps.Kit(BUNDLED, devices=2, prompts=1, tokens=4)
    assert steps.STEPS["logits"](kit)["passed"]
    assert steps.STEPS["lossless"](kit) == {"passed": True, "same texts": 5, "of": 5}


def test_the_page_is_one_file_with_claims_and_verdict(folder: Path) -> None:
    """It loads nothing from elsewhere and tells the claim beside what was measured."""
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "data:image/png;base64," in page
    assert not any(word in page for word in ("http://", "https://", "<script", "<link"))
    assert "tokens per second, one text" in page and "1,000" in page and "A trial of the kit" in page


def test_it_goes_on_where_it_stopped(folder: Path, found: dict, tmp_path: Path, monkeypatch) -> None:
    """Steps that are in the report are not run again; those that are missing are."""
    cut = copy.deepcopy(found)
    del cut["steps"]["speed by context"]
    (tmp_path / "report.json").write_text(json.dumps(cut))
    for name in steps.STEPS:
        monkeypatch.setitem(steps.STEPS, name, lambda kit, name=name: {"rows": [{"ran": name}, {"ran": name}]})
    command()([*SMALL, "--out", str(tmp_path)])
    again = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert again.pop("speed by context")["rows"][0] == {"ran": "speed by context"}
    assert again == cut["steps"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": "nowhere"}, "nowhere: not found"),
        ({"tokens": "9"}, "was begun with another checkpoint or other options"),
        ({"prompts": "1"}, "argument --prompts"),
    ],
)
def test_bad_input_is_one_line(changes: dict, words: str, folder: Path, capsys) -> None:
    arguments = [*SMALL, "--out", str(folder)]
    for name, value in changes.items():
        arguments += [f"--{name}", value]
    with pytest.raises(SystemExit) as stopped:
        main_guard(lambda: command()(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and words in error


def test_a_checkpoint_without_a_drafter_is_named(tmp_path: Path, capsys) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(BUNDLED, bare, ignore=shutil.ignore_patterns("dflash"))
    with pytest.raises(SystemExit) as stopped:
        main_guard(lambda: command()(["--checkpoint", str(bare), "--out", str(tmp_path / "out")]))
    assert stopped.value.code == 2 and "has no drafter" in capsys.readouterr().err


def test_verdicts(found: dict) -> None:
    """A failed gate silences speed; another model is no verdict on the claim; the claim holds from 1,000 on."""
    assert report.verdict(found).startswith("A trial of the kit, not of the claim")
    pro = {**found, "is_pro": True}
    code = pro["steps"]["speed by domain"]["rows"][0]
    for speed, words in ((999.0, "does not hold here: 999"), (1000.0, "holds here: 1,000")):
        code["drafted, tokens per second"] = speed
        assert words in report.verdict(pro)
    pro["steps"]["lossless"]["passed"] = False
    assert report.verdict(pro) == "Nothing can be said of speed: lossless failed, so this is not the model."
    del pro["steps"]["lossless"], pro["steps"]["speed by domain"]
    assert report.verdict(pro).startswith("Not complete")
