"""The serve command as a user meets it, on the bundled model."""

import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import openai
import pytest

from mimo_jax.cli.guard import main_guard

ROOT = Path(__file__).parents[3]
SERVE = ROOT / "scripts" / "serve.py"
SCREENSHOT = ROOT / "tests" / "tools" / "page_screenshot.py"


def test_from_start_to_signal(tmp_path):
    """It says where it listens, serves who has a key, and on SIGTERM finishes what is under way."""
    keys = tmp_path / "keys"
    keys.write_text("ann secret\n")
    command = [sys.executable, SERVE, "--port", "0", "--context", "256", "--slots", "2", "--api-key-file", keys]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            first = server.stdout.readline()
            assert first.startswith("mimo-tiny listens on http://127.0.0.1:"), first
            address = first.split()[3].rstrip(",")
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
            with client:
                assert httpx2.get(f"{address}/v1/models").status_code == 401
                (model,) = client.models.list().data
                asked = {"model": model.id, "prompt": "def add(a, b):", "temperature": 0, "max_tokens": 200}
                whole = client.completions.create(**asked, extra_body={"ignore_eos": True})
                stream = client.completions.create(**asked, extra_body={"ignore_eos": True}, stream=True)
                text = next(stream).choices[0].text
                server.send_signal(signal.SIGTERM)
                text += "".join(chunk.choices[0].text for chunk in stream)
                assert text == whole.choices[0].text
            assert server.wait(60) == 0
        finally:
            server.kill()


@pytest.mark.skipif(importlib.util.find_spec("PyQt6") is None, reason="PyQt6-WebEngine is not installed")
def test_a_browser_shows_what_is_said_and_how_fast(tmp_path):
    """In a Chromium without a screen: two answers, each with its speed and its tokens per round, and no fault."""
    command, picture = [sys.executable, SERVE, "--port", "0", "--draft", "dflash"], tmp_path / "page.png"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().split()[3].rstrip(",")
            browse = [sys.executable, SCREENSHOT, address, picture, "def fib(n):", "class Stack:"]
            browsed = subprocess.run(browse, capture_output=True, text=True, timeout=120)
        finally:
            server.kill()
    assert browsed.returncode == 0 and "console:" not in browsed.stderr, browsed.stderr
    lines = browsed.stdout.splitlines()
    assert len(lines) == 2 and all(re.match(r"\d+ tokens · .+ tokens/s · .+ tokens per round", line) for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0: reaches beyond this machine"),
        (("--host", "example.org"), "--host example.org: reaches beyond this machine"),
        (("--port", "99999"), "--port"),
        (("--api-key", "a", "--api-key-file", "b"), "not allowed with"),
        (("--api-key-file", "nowhere.txt"), "nowhere.txt: No such file"),
        (("--api-key-file", "/dev/null"), "/dev/null: expected lines of ACCOUNT KEY or KEY"),
        (("--port", "0", "--model", "nowhere"), "nowhere: not found"),
        (("--sessions", "0"), "--sessions"),
        (("--idle-minutes", "5"), "--session-minutes and --idle-minutes need --sessions"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    """Before any work is done."""
    monkeypatch.syspath_prepend(str(SERVE.parent))
    import serve

    with pytest.raises(SystemExit) as exit_info:
        main_guard(lambda: serve.main(list(arguments)))
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message in error
    assert error.count("\n") == 1
