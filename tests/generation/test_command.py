"""The generate command as a user meets it, on the bundled model."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "generate.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        errors="surrogateescape",
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def cached(cache: Path) -> dict[str, int]:
    """How many compilations of each program are kept."""
    return Counter(path.name.partition("-")[0] for path in cache.iterdir() if path.name.endswith("-cache"))


def test_text_then_a_summary_then_one_line_of_json(cache):
    """The text starts with the prompt, the last line is JSON, and a second run compiles nothing anew."""
    arguments = ("--prompt", "def add(a, b):", "--max-tokens", "12")
    first = run(*arguments, JAX_COMPILATION_CACHE_DIR=str(cache))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def add(a, b):")
    record = json.loads(first.stdout.splitlines()[-1])
    assert record["generated_tokens"] <= 12
    assert record["tokens_per_second"] > 0
    assert "first token" in first.stderr
    compiled = cached(cache)
    second = run(*arguments, JAX_COMPILATION_CACHE_DIR=str(cache))
    # On a busy machine small programs, too, may take long enough to be kept; those count only from then on.
    assert compiled and {name: cached(cache)[name] for name in compiled} == compiled
    assert second.stdout.splitlines()[:-1] == first.stdout.splitlines()[:-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "prompt: empty"),
        ((), "prompt: missing"),
        (("--prompt", "x", "--temperature", "-1"), "temperature=-1.0"),
        (("--prompt", "x", "--greedy", "--top-p", "0.5"), "--greedy leaves nothing to"),
        (("--prompt", "x", "--temperature", "0", "--top-k", "5"), "--greedy leaves nothing to"),
        (("--prompt-ids", "1,a"), "--prompt-ids"),
        (("--prompt", "x", "--model", "nowhere"), "nowhere: not found"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt: No such file"),
        (("--prompt-file", "/dev/zero"), "/dev/zero: more than 16777216 bytes"),
        (("--prompt-file", "/"), "/: Is a directory"),
        (("--prompt", "x" * 9000), "the context holds 1024"),
        (("--prompt", "caf\udce9"), "not valid UTF-8"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    """Whatever is wrong with the request, the user sees one line that names it."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import generate

    from mimo_jax.cli.guard import main_guard

    with pytest.raises(SystemExit) as exit_info:
        main_guard(lambda: generate.main(list(arguments)))
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_importing_the_package_is_fast():
    """`import mimo_jax` alone loads neither JAX nor anything heavy."""
    code = "import sys, mimo_jax; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'numpy', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
