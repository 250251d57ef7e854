"""Two writers of one place: one wins, the other is told, and nothing of a living one is touched."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mimo_jax.checkpoint import convert, orbax
from mimo_jax.checkpoint.convert import to_huggingface, to_orbax, verify
from mimo_jax.checkpoint.manifest import new_directory
from mimo_jax.errors import UserError
from mimo_jax.files import exclusive, write_atomically
from tests.checkpoint.samples import random_tensors, save_checkpoint, small

ROOT = Path(__file__).parents[2]
WRITER = """
import sys
from pathlib import Path
from mimo_jax.checkpoint.manifest import new_directory
with new_directory(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("not finished")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def source(tmp_path) -> Path:
    config = small(layer_pattern=(0, 1), moe_pattern=(0, 1))
    return save_checkpoint(tmp_path / "hf", config, random_tensors(config))


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_second_of_two_conversions_is_refused(source, tmp_path, monkeypatch, overwrite: bool) -> None:
    """While one conversion is at work another to the same place ends with one line, and the first one's is whole."""
    refused = []

    def read_params(*arguments):
        for second in (to_orbax, to_huggingface):
            with pytest.raises(UserError, match=r"out: another process is writing it") as caught:
                second(source, tmp_path / "out", overwrite)
            refused.append(str(caught.value))
        return original(*arguments)

    original = convert.huggingface.read_params
    monkeypatch.setattr(convert.huggingface, "read_params", read_params)
    to_orbax(source, tmp_path / "out", overwrite)
    assert len(refused) == 2 and not any("\n" in line for line in refused)
    assert verify(tmp_path / "out")["verified"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_living_writer_keeps_what_it_builds_and_a_killed_one_does_not(tmp_path) -> None:
    """An unfinished folder stays while its writer lives, even stopped; once that is killed the next run clears it."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writer = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdin is not None and writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="another process is writing it"), new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.partial" / "half").exists()
    writer.kill()
    writer.wait()
    writer.stdin.close()
    writer.stdout.close()
    with new_directory(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/whole"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path) -> None:
    """A destination that comes into being while another is built for it stays as it is."""
    with pytest.raises(UserError, match="already exists"), new_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/theirs"]


def test_a_half_removed_version_does_not_come_back(tmp_path) -> None:
    """An --overwrite killed while it removed the old version leaves nothing that a later run takes for a checkpoint."""
    (tmp_path / ".out.replaced" / "params").mkdir(parents=True)
    with new_directory(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_savers_of_a_run_do_not_harm_each_other(tmp_path) -> None:
    """A step that another process is saving is refused in one line, other steps are saved, and neither is lost."""
    tree = {"w": np.arange(3.0, dtype=np.float32)}
    with new_directory(tmp_path / "00000002") as theirs:
        (theirs / "shard").touch()
        with pytest.raises(UserError, match="00000002: another process is writing it"):
            orbax.save_step(tmp_path, 2, tree)
        orbax.save_step(tmp_path, 3, tree)
        assert (theirs / "shard").exists()
    assert orbax.steps(tmp_path) == [2, 3]
    abstract = {"w": jax.ShapeDtypeStruct((3,), np.float32)}
    np.testing.assert_array_equal(orbax.restore_latest(tmp_path, abstract)["w"], tree["w"])


def test_leftovers_of_killed_saves_go_away(tmp_path) -> None:
    """A save clears what killed ones left, whatever step they were at."""
    (tmp_path / ".00000007.partial").mkdir()
    (tmp_path / ".00000007.lock").touch()
    (tmp_path / "trash-00000005").mkdir()
    orbax.save_step(tmp_path, 9, {"w": np.zeros(3, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["00000009"]


def test_leftovers_of_killed_writes_go_away(tmp_path) -> None:
    """Writing a file removes what killed writers of it left, and nothing of a living writer or of another file."""
    for name in (".a.json.dead.tmp", ".a.json.living.tmp", ".b.json.dead.tmp"):
        (tmp_path / name).touch()
    with (tmp_path / ".a.json.living.tmp").open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        write_atomically(tmp_path / "a.json", b"{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.living.tmp", ".b.json.dead.tmp", "a.json"]


def test_a_destination_around_or_in_the_source_is_refused(source, tmp_path) -> None:
    """By whatever names, a conversion replaces neither its source nor a folder that holds it."""
    converted = tmp_path / "around"
    to_orbax(source, converted)
    shutil.move(source, converted / "inner")
    (tmp_path / "alias").symlink_to(converted)
    for destination in (converted, tmp_path / "alias", converted / "inner", converted / "inner" / "new"):
        with pytest.raises(UserError, match="lies in the source, or the source in it"):
            to_orbax(converted / "inner", destination, overwrite=True)
    assert (converted / "inner" / "model.safetensors").exists() and (converted / "manifest.json").exists()


def test_a_place_that_cannot_be_locked_is_one_line(tmp_path) -> None:
    """A lock file that cannot be made, or a link in its place, is named; nothing is written through it."""
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    for lock in (tmp_path / ".lock", tmp_path / "absent" / ".lock"):
        with pytest.raises(UserError, match=r"\.lock: could not be locked"), exclusive(lock, "held"):
            pass
    assert not (tmp_path / "elsewhere").exists()
