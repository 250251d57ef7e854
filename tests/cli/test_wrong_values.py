"""Every option of every command of every script, with values that are missing, wrong or extreme.

Options come from the parsers themselves, so a new one is tried without a line here, unless it is required.
"""

import argparse
import importlib.util
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from mimo_jax.checkpoint.dflash import FOLDER, write_drafter
from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.values import output_file
from mimo_jax.modeling.dflash import init_drafter
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training import run
from mimo_jax.training.drafter import DraftTrainConfig, Geometry, drafter_for
from mimo_jax.training.pretraining import TrainConfig
from mimo_jax.training.reading.characters import CharacterConfig
from mimo_jax.training.reading.copying import CopyConfig
from mimo_jax.training.reading.joining import JoinConfig
from mimo_jax.training.self_distillation import Texts
from tests.checkpoint.gguf_samples import write_llama
from tests.checkpoint.samples import random_tensors, save_checkpoint, small

SCRIPTS = sorted((Path(__file__).parents[2] / "scripts").glob("*.py"))
CONFIG = small(vocab_size=320)
STUDY = """
title = "A study"
experiment = "target"
seeds = [0]
metrics = ["bits_per_byte"]
minutes = 1
[factors]
router = ["float32", "bfloat16"]
[base]
experts_per_token = 1
"""
# Where work begins. A call that comes so far was accepted.
WORK = (
    "mimo_jax.ablation.runner.run_study",
    "mimo_jax.checkpoint.manifest.verify_files",
    "mimo_jax.checkpoint.convert.fill_checkpoint",
    "mimo_jax.checkpoint.gguf.fill_checkpoint",
    "mimo_jax.checkpoint.huggingface.read_params",
    "mimo_jax.cli.options.join",
    "mimo_jax.evaluation.acceptance.continue_all",
    "mimo_jax.evaluation.bits._nats_per_window",
    "mimo_jax.evaluation.bits.latest_state",
    "mimo_jax.evaluation.llama_cpp.build",
    "mimo_jax.evaluation.native_speed.plain_rate",
    "mimo_jax.evaluation.paths._engine",
    "mimo_jax.evaluation.paths.functions_of",
    "mimo_jax.evaluation.random_checkpoint.init_params",
    "mimo_jax.evaluation.rounding._laws",
    "mimo_jax.evaluation.slice.random_weights",
    "mimo_jax.evaluation.speed.generate",
    "mimo_jax.evaluation.reading.transcribe",
    "mimo_jax.evaluation.speed.interleaved",
    "mimo_jax.generation.stream",
    "mimo_jax.planning.compiled.compile_programs",
    "mimo_jax.planning.report.record_of",
    "mimo_jax.planning.timeline.step_timeline",
    "mimo_jax.replication.steps.run_steps",
    "mimo_jax.serving.engine.Engine.__init__",
    "mimo_jax.training.corpus.collect",
    "mimo_jax.training.drafter.latest_state",
    "mimo_jax.training.launch.go",
    "mimo_jax.training.reading.launch.go",
    "mimo_jax.training.reading.launch.reader_of",
    "mimo_jax.training.run.restore",
    "mimo_jax.training.run.latest_state",
    "mimo_jax.training.run.save_figure",
    "mimo_jax.training.self_distillation.generate_chunk",
    "pallas_kernels.expert_matmul.report.rows",
)


def load_script(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {path.stem: load_script(path) for path in SCRIPTS}


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of every command; of a script without commands, its own under the empty name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {"": parser}


COMMANDS = {
    (script, name): parser
    for script, module in MODULES.items()
    for name, parser in commands_of(module.parser()).items()
}
OPTIONS = [
    (script, name, action)
    for (script, name), parser in COMMANDS.items()
    for action in parser._actions
    if not isinstance(action, argparse._HelpAction)
]
IDS = [f"{script}-{name}-{action.dest}" for script, name, action in OPTIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with its drafter, a corpus, texts, a run and a drafter's run, as small as they can be."""
    folder = tmp_path_factory.mktemp("world")
    model = save_checkpoint(folder / "model", CONFIG, random_tensors(CONFIG))
    tokenizer = Tokenizer.train(["def f(items):\n    return items\n"] * 3, 300)
    tokenizer.save(model / "tokenizer.json")
    drafter = drafter_for(CONFIG, tokenizer, Geometry())
    write_drafter(model / FOLDER, drafter, init_drafter(drafter, jax.random.key(0)))
    (folder / "corpus").mkdir()
    tokenizer.save(folder / "corpus" / "tokenizer.json")
    for split in ("train", "heldout"):
        np.random.default_rng(0).integers(0, 262, 20_000).astype(np.uint16).tofile(folder / "corpus" / f"{split}.bin")
    texts = Texts(np.ones((4, 32), np.uint16), np.ones(4, np.int32), np.full(4, 32, np.int32))
    (folder / "texts").mkdir()
    np.savez(folder / "texts" / "chunk-00000.npz", **vars(texts))
    run.prepare(folder / "run", run.settings_of(CONFIG, TrainConfig(batch=2, length=16)))
    (folder / "run" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    run.prepare(folder / "drafter_run", run.settings_of(drafter, DraftTrainConfig(steps=1)))
    run.prepare(folder / "characters_run", run.settings_of(CONFIG, CharacterConfig(steps=1)))
    run.prepare(folder / "copying_run", run.settings_of(CONFIG, CopyConfig(steps=1)))
    run.prepare(folder / "join_run", run.settings_of(CONFIG, JoinConfig(steps=1)))
    write_llama(folder / "model.gguf")
    (folder / "file").write_text("a file")
    (folder / "text").write_text("def f(items):\n    return items\n" * 2000)
    places = "".join(f'{name} = "{folder / place}"\n' for name, place in (("model", "model"), ("data", "corpus")))
    (folder / "study.toml").write_text(STUDY + places)
    return folder


@pytest.fixture(autouse=True)
def here(folder, tmp_path, monkeypatch) -> None:
    """Work does not begin, faults of the program are raised, and what is written lands in a folder of its own."""

    def accepted(*arguments, **options):
        raise SystemExit(0)

    for name in WORK:
        monkeypatch.setattr(name, accepted)
    for missing in ("pallas_kernels.topology.missing", "pallas_kernels.expert_matmul.report.missing"):
        monkeypatch.setattr(missing, lambda: None)  # the same with and without the compilers
    monkeypatch.setenv("MIMO_TRACEBACK", "1")
    monkeypatch.chdir(tmp_path)


def good_arguments(folder: Path, script: str, name: str) -> dict[str, list[str]]:
    """By destination, what makes a command of its required options begin to work."""
    given = {
        "checkpoint": folder / "model",
        "chunks": 1,
        "data": folder / "corpus",
        "destination": "converted",
        "directory": folder / "model",
        "model": folder / "model",
        "out": "out",
        "prompt": "def",
        "run": folder / ("drafter_run" if name == "export-drafter" else "run"),
        "source": folder / "model",
        "start": folder / "run",
        "steps": 1,
        "texts": folder / "texts",
        "trace": "trace",
    }
    own = {
        ("train", "pretrain"): {"run": "new", "start": folder / "model", "batch": 2, "length": 16},
        ("train", "anneal"): {"run": "new"},
        ("train", "drafter"): {"run": "new", "start": folder / "model" / FOLDER, "anchors": 2},
        ("train", "characters"): {"run": "new", "start": folder / "model"},
        ("train", "copying"): {"run": "new", "start": folder / "model"},
        ("train", "export-copying"): {"run": folder / "copying_run"},
        ("train", "export-characters"): {"run": folder / "characters_run"},
        ("train", "join"): {"run": "new", "start": folder / "model"},
        ("train", "export-seeing"): {"run": folder / "join_run"},
        ("train", "corpus"): {"data": "corpus"},
        ("benchmark", "slice"): {"layers": 1},
        ("convert", "from-gguf"): {"source": folder / "model.gguf"},
        ("evaluate", "bits"): {"windows": 3, "out": "result.json"},
        ("evaluate", "acceptance"): {"plot": "plot.png", "out": "result.json"},
        ("evaluate", "llama.cpp"): {"out": "result.json"},
        ("evaluate", "paths"): {"out": "result.json"},
        ("evaluate", "domains"): {"plot": "plot.png", "out": "result.json"},
        ("evaluate", "rounding"): {"model": folder / "model.gguf", "calibrate": folder / "text", "out": "result.json"},
        ("ablate", ""): {"study": folder / "study.toml"},
    }
    given |= own.get((script, name), {})
    arguments = {}
    groups = COMMANDS[script, name]._mutually_exclusive_groups
    alternatives = [action.dest for group in groups for action in group._group_actions[1:]]
    for action in COMMANDS[script, name]._actions:
        if action.dest in given and action.dest not in alternatives:
            text = str(given[action.dest])
            arguments[action.dest] = [f"{action.option_strings[-1]}={text}"] if action.option_strings else [text]
    return arguments


def outcome(script: str, argv: list[str], capsys) -> int:
    """The exit code of a command, which must be 0, or 2 with one line that says why."""
    try:
        main_guard(lambda: MODULES[script].main(argv))
        code = 0
    except SystemExit as end:
        code = end.code or 0
    error = capsys.readouterr().err
    assert code in (0, 2), (argv, error)
    if code == 2:
        said = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and error.endswith(f"{said[0]}\n"), (argv, error)
    return code


def arguments_with(folder: Path, script: str, name: str, changes: dict[str, list[str]]) -> list[str]:
    arguments = good_arguments(folder, script, name) | changes
    return [name] * bool(name) + [text for texts in arguments.values() for text in texts]


def wrong_values(folder: Path) -> Iterator[str]:
    """What a careless or a hostile user may give to any option."""
    yield from ("", "x", "-1", "0", "1", "1e-320", "1e999", "nan", str(10**30), "9" * 5000)
    yield from ("\udce9", "a\nb", "x" * 300, "a=", "1xh200", "0:0")
    yield from ("/nonexistent/x", "/dev/full", "/proc/x", "..")
    yield from (str(folder), str(folder / "file"), str(folder / "file" / "x"), str(folder / "model"))


@pytest.mark.parametrize(("script", "name"), COMMANDS)
def test_good_arguments_begin_the_work(script, name, folder, capsys):
    """What the test below changes is a call that is accepted, unless it lacks a package, a GPU or a manifest."""
    absent = script in ("dynamo_worker", "gpu_report", "serve_replicas") or name in ("round", "soak", "verify")
    expected = 2 if absent else 0
    changes = {"beside": ["--beside=nothing"]} if name == "decode" else {}
    assert outcome(script, arguments_with(folder, script, name, changes), capsys) == expected


@pytest.mark.parametrize(("script", "name", "action"), OPTIONS, ids=IDS)
def test_no_value_of_any_option_ends_in_a_traceback(script, name, action, folder, capsys):
    """Whatever an option is given, the command starts its work, or ends with one line and exit code 2."""
    option = action.option_strings[-1] if action.option_strings else None
    if action.nargs == 0:
        outcome(script, arguments_with(folder, script, name, {action.dest: [option]}), capsys)
        assert outcome(script, arguments_with(folder, script, name, {action.dest: [f"{option}=x"]}), capsys) == 2
        return
    for value in wrong_values(folder):
        changed = {action.dest: [f"{option}={value}" if option else value]}
        outcome(script, arguments_with(folder, script, name, changed), capsys)
    without = outcome(script, arguments_with(folder, script, name, {action.dest: []}), capsys)
    assert without == 2 or not action.required
    if option:
        assert outcome(script, arguments_with(folder, script, name, {action.dest: [option]}), capsys) == 2


@pytest.mark.parametrize("script", MODULES)
def test_what_no_parser_knows_is_one_line(script, capsys):
    """An unknown option or command, or none where one is needed."""
    assert outcome(script, ["--unknown"], capsys) == 2
    assert outcome(script, ["unknown"], capsys) == 2
    outcome(script, [], capsys)
    assert outcome(script, ["--help"], capsys) == 0


OUTPUTS = [entry for entry in OPTIONS if entry[2].dest in ("out", "plot", "trace", "destination")]


@pytest.mark.parametrize(
    ("script", "name", "action"), OUTPUTS, ids=[f"{script}-{name}-{action.dest}" for script, name, action in OUTPUTS]
)
def test_outputs_are_tried_before_the_work(script, name, action, folder, capsys):
    """What cannot be written is said at once: no finished result is lost."""
    for value in ("", "/proc/x", str(folder / "file" / "x"), "x" * 300):
        text = f"{action.option_strings[-1]}={value}" if action.option_strings else value
        if value or action.type is output_file:
            assert outcome(script, arguments_with(folder, script, name, {action.dest: [text]}), capsys) == 2


@pytest.mark.parametrize("value", ["missing/result.json", ".", "/dev/null"])
def test_a_file_to_write_is_a_regular_one_in_a_folder(value):
    """A folder that is missing, a folder in place of the file, and a device, which a rename would replace."""
    with pytest.raises(argparse.ArgumentTypeError, match=value):
        output_file(value)
    output_file("result.json")
    assert list(Path().iterdir()) == []


def test_what_is_not_installed_is_said_before_the_work(folder, monkeypatch, capsys):
    """Decoding beside transformers needs torch, which no lock file holds; without them it needs neither."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    with pytest.raises(SystemExit, match="2"):
        main_guard(lambda: MODULES["benchmark"].main(["decode", f"--model={folder / 'model'}"]))
    assert "transformers (--beside nothing leaves it out): not installed: torch; install" in capsys.readouterr().err
    assert outcome("benchmark", ["decode", f"--model={folder / 'model'}", "--beside=nothing"], capsys) == 0
