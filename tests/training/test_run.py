"""A run can be killed at any time and given again: same curve, no doubled points, nothing lost but unsaved steps."""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest

from mimo_jax.checkpoint import orbax
from mimo_jax.errors import UserError
from mimo_jax.training import run
from mimo_jax.training.corpus import identity
from mimo_jax.training.export import export
from mimo_jax.training.launch import Launch, pretrain
from mimo_jax.training.pretraining import TrainConfig, init_state
from mimo_jax.training.qat import init_qat
from tests.tiny import tiny_config

CONFIG = tiny_config(layer_pattern=(0, 1), moe_pattern=(0, 1), hidden_size=32, vocab_size=128)
PLAIN = TrainConfig(batch=2, length=16, warmup=2, mtp_share=2)
QAT = dataclasses.replace(PLAIN, qat=True, decay_steps=20)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 2000).astype(np.uint16)
LAST = 12


class Killed(Exception):
    """Stands for the process being gone."""


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(run, "LOG_EVERY", 1)


def go_on(directory, train: TrainConfig):
    """What the command does: prepare, restore if there is something, train."""
    run.prepare(directory, run.settings_of(CONFIG, train))
    saved = orbax.steps(directory / "checkpoints")
    fresh_state = init_qat if train.qat else init_state
    state = run.latest_state(directory, CONFIG, train) if saved else fresh_state(CONFIG, train)
    update = run.pretraining_update(TOKENS, CONFIG, train)
    return run.train_until(directory, state, LAST, update, train.batch * train.length, save_every=5)


def curve(directory) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]


@pytest.fixture(scope="module", params=[PLAIN, QAT], ids=["plain", "qat"])
def straight(request, tmp_path_factory):
    """An uninterrupted run: its folder, its settings, its last state."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LOG_EVERY", 1)
        return directory, request.param, go_on(directory, request.param)


@pytest.mark.parametrize("killed_at", [3, 8])
def test_resumed_run_equals_an_uninterrupted_one(straight, tmp_path, monkeypatch, killed_at):
    """Killed before or after its first save and given again, a run ends bit for bit where it would have ended."""
    directory, train, expected = straight
    batch_at = run.batch_at

    def dying(tokens, step, *rest):
        if step == killed_at:
            raise Killed
        return batch_at(tokens, step, *rest)

    resumed = tmp_path / "run"
    monkeypatch.setattr(run, "batch_at", dying)
    with pytest.raises(Killed):
        go_on(resumed, train)
    monkeypatch.setattr(run, "batch_at", batch_at)
    with (resumed / "log.jsonl").open("a") as log:
        log.write('{"step": 99')  # the kill came in the middle of a line
    state = go_on(resumed, train)
    assert curve(resumed) == curve(directory)
    assert [step for step, *_ in curve(resumed)] == list(range(1, LAST + 1))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_saves_are_thinned_and_restorable(straight):
    """The newest two saves are kept, and what is restored is what was in memory."""
    directory, train, expected = straight
    assert orbax.steps(directory / "checkpoints") == [10, 12]
    restored = run.latest_state(directory, CONFIG, train)
    assert int(restored.step) == LAST
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(expected)):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_leftovers_of_a_killed_save_are_ignored(tmp_path):
    """A half-written checkpoint has another name: it is neither listed nor restored."""
    directory = tmp_path / "checkpoints"
    (directory / "00000020.orbax-checkpoint-tmp").mkdir(parents=True)
    (directory / "trash-00000005").mkdir()
    assert orbax.steps(directory) == []
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        orbax.restore_latest(directory, {})


def test_a_run_is_not_continued_with_other_settings(straight):
    """Giving a run's folder with another model or schedule names what differs."""
    directory, train, _ = straight
    other = dataclasses.replace(train, warmup=3)
    with pytest.raises(UserError, match=r"run.json: train=.*use another folder"):
        run.prepare(directory, run.settings_of(CONFIG, other))


def flip(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_every_flipped_bit_of_a_step_is_seen(straight, tmp_path):
    """A damaged newest step is refused in one line that names it and the step to go on from, and that one restores."""
    directory, train, _ = straight
    damaged = tmp_path / "run"
    shutil.copytree(directory, damaged)
    newest = damaged / "checkpoints" / f"{LAST:08d}"
    paths = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    rng = random.Random(0)
    for path in rng.choices(paths, k=20) + paths:
        position = rng.randrange(path.stat().st_size)
        flip(path, position)
        with pytest.raises(UserError, match=rf"{newest.name}/.*; remove {newest} to go on from step 10$") as caught:
            run.latest_state(damaged, CONFIG, train)
        assert "\n" not in str(caught.value)
        flip(path, position)
    flip(paths[0], 0)
    shutil.rmtree(newest)
    assert int(run.latest_state(damaged, CONFIG, train).step) == 10


def test_a_run_has_one_trainer(tmp_path):
    """A second process that would train the run is told so in one line, before it writes anything."""
    TOKENS.tofile(tmp_path / "train.bin")
    second = Launch(tmp_path / "run", tmp_path, 1)
    with run.only_trainer(tmp_path / "run"):
        with pytest.raises(UserError, match=r"run: is being trained by another process") as caught:
            pretrain(second, PLAIN, "mimo-tiny", None, "float32")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_knows_its_corpus(tmp_path):
    """A run is not continued on other tokens, nor exported or annealed with another tokenizer than its own."""
    TOKENS.tofile(tmp_path / "train.bin")
    (tmp_path / "tokenizer.json").write_text("{}")
    run.prepare(tmp_path / "run", run.settings_of(CONFIG, PLAIN, corpus=identity(tmp_path)))
    run.check_tokenizer(tmp_path / "run", tmp_path / "tokenizer.json")
    TOKENS[:-1].tofile(tmp_path / "train.bin")
    (tmp_path / "tokenizer.json").write_text("{ }")
    with pytest.raises(UserError, match=r"run.json: corpus=.*use another folder"):
        run.prepare(tmp_path / "run", run.settings_of(CONFIG, PLAIN, corpus=identity(tmp_path)))
    with pytest.raises(UserError, match=r"tokenizer.json: not the tokenizer that .*run was trained with"):
        export(tmp_path / "run", tmp_path / "tokenizer.json", tmp_path / "out")


def test_a_damaged_description_of_a_run_is_one_line(tmp_path):
    """A run.json that is no longer JSON, or no longer a run's, is named."""
    for text, message in (("{", "not valid JSON"), ("{}", "written by another version"), ("[]", "expected a JSON obj")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=rf"run.json: {message}"):
            run.read_settings(tmp_path)


def test_loss_plot(straight, tmp_path):
    """The loss curve is drawn to a PNG."""
    pytest.importorskip("matplotlib")
    directory, _, _ = straight
    run.plot_losses([directory], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
