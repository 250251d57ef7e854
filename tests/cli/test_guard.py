"""Whatever ends a command, its user sees one line and an exit code that scripts can read."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_jax.cli.guard import main_guard
from mimo_jax.errors import UserError

ROOT = Path(__file__).parents[2]
JAX = "class config:\n    update = staticmethod(lambda *_: None)\n"


@pytest.fixture
def guarded(tmp_path):
    """Runs a guarded `main` of these lines in a process of its own, where JAX is what `jax` says: it starts at once."""

    def run(body: str, jax: str = JAX, closing: str = "", **streams) -> subprocess.CompletedProcess:
        (tmp_path / "jax.py").write_text(jax)
        script = tmp_path / "script.py"
        lines = [f"    {line}\n" for line in body.splitlines()]
        script.write_text(
            "import os, signal, sys\nfrom mimo_jax.cli.guard import main_guard\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits that it is ignored
            f"def main():\n{''.join(lines)}\nmain_guard(main)\n"
        )
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        return subprocess.run(
            ["sh", "-c", f'exec "$0" "$1" {closing}', sys.executable, script],
            **{"text": True, "env": environment, "timeout": 60, **streams},
        )

    return run


def said(error: BaseException, capsys) -> str:
    """What a command that raises `error` leaves on standard error."""

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main_guard(main)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("two\nlines \x1b[31m"), "error: two\\nlines \\x1b[31m\n"),
        (PermissionError(13, "Permission denied", "/closed/x"), "error: /closed/x: Permission denied\n"),
        (OSError(28, "No space left on device"), "error: output: No space left on device\n"),
        (MemoryError(), "error: memory: there is not enough for this (refused by the system)\n"),
        (ModuleNotFoundError("no", name="torch.x"), "error: torch.x is not installed; `make install`"),
        (TypeError("odd"), "error: a fault of this program, TypeError: odd; MIMO_TRACEBACK=1 shows where\n"),
    ],
)
def test_every_error_is_one_line(error, line, capsys, monkeypatch):
    """The place and the reason, without what a terminal would obey; a fault of the program says that it is one."""
    monkeypatch.delenv("MIMO_TRACEBACK", raising=False)
    found = said(error, capsys)
    assert found.startswith(line) and found.count("\n") == 1


def test_faults_of_the_program_can_be_traced(monkeypatch):
    """With MIMO_TRACEBACK the error itself comes out."""
    monkeypatch.setenv("MIMO_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main_guard(lambda: 1 / 0)


@pytest.mark.parametrize("given", [{}, {"JAX_COMPILATION_CACHE_DIR": "compiled"}])
def test_a_user_without_a_home_is_served(given, monkeypatch):
    """As in a container that runs under a number: without a cache of compiled programs, unless its place is named."""
    import jax

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", nowhere)
    updated = {}
    monkeypatch.setattr(jax.config, "update", updated.__setitem__)
    main_guard(lambda: None)
    assert updated["jax_compilation_cache_dir"] == given.get("JAX_COMPILATION_CACHE_DIR")


def test_ctrl_c_during_an_import_is_130_without_a_word(guarded):
    """The import makes an ImportError of whatever interrupts it, as extension modules do."""
    interrupted = (
        "import os, signal\n"
        f"try:\n    os.kill(os.getpid(), {signal.SIGINT:d})\n    while True: pass\n"
        "except BaseException:\n    raise ImportError('half of it')\n"
    )
    done = guarded("pass", jax=interrupted)
    assert (done.returncode, done.stderr) == (130, "")


def test_ctrl_c_unwinds_the_work(guarded):
    """Temporary files go before the command ends with 130."""
    done = guarded(f"try:\n    os.kill(os.getpid(), {signal.SIGINT:d})\n    while True: pass\nfinally: print('tidied')")
    assert (done.returncode, done.stdout, done.stderr) == (130, "tidied\n", "")


@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)", "print('x'); sys.exit(0)"])
def test_a_full_disk_under_standard_output_is_one_line(guarded, body):
    """Whether it shows while printing or at the end, and for --help too."""
    with open("/dev/full", "w") as full:
        done = guarded(body, stdout=full)
    assert (done.returncode, done.stderr) == (2, "error: output: No space left on device\n")


def test_a_reader_that_has_seen_enough_is_no_error(guarded):
    """`| head -1` closes the pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        done = guarded("print('x')", stdout=pipe)
    assert (done.returncode, done.stderr) == (0, "")


def test_closed_streams(guarded):
    """Results have nowhere to go without standard output; messages may go nowhere, but never into the results."""
    done = guarded("print('x')", closing=">&-")
    assert done.returncode == 2 and done.stderr.startswith("error: standard output is closed")
    done = guarded("print('a message', file=sys.stderr)\nprint('x')", closing="2>&-")
    assert (done.returncode, done.stdout) == (0, "x\n")


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_absent_is_one_line(platform):
    """JAX itself raises a bare AssertionError for the one, and a RuntimeError of its own for the other."""
    code = "from mimo_jax.cli.guard import main_guard; main_guard(lambda: __import__('jax').devices())"
    # Without the compilers' folder in the path: a plugin that finds no driver logs of its own accord.
    environment = {**os.environ, "JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if not done.returncode:
        pytest.skip("there is a GPU")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: JAX_PLATFORMS={platform}: no such device") and done.stderr.count("\n") == 1
