"""The published part of the bundled drafter in another engine, which reads our folder with its own programs."""

import os
import sys
from pathlib import Path

import pytest

import mimo_jax as mimo
from mimo_jax.errors import UserError
from mimo_jax.evaluation import llama_cpp_drafting
from mimo_jax.tokenizer import Tokenizer

FOLDER = os.environ.get("MIMO_LLAMA_CPP")  # that llama.cpp was built in
SERVER = f"""#!{sys.executable}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = (asked["prompt"] * 9)[: asked["n_predict"]]
        self.do_GET()
        self.wfile.write(json.dumps({{"tokens": tokens, "timings": {{"draft_n_accepted": 5}}}}).encode())

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


@pytest.mark.skipif(not FOLDER, reason="MIMO_LLAMA_CPP names no folder that llama.cpp was built in")
def test_llama_cpp_reads_the_bundled_folder_and_drafts_alike():
    """The same greedy texts, and within 5 % of the same tokens per round, from the folder as it lies there."""
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="llama.cpp's converter needs it")
    tokenizer = Tokenizer.load(mimo.BUNDLED / "tokenizer.json")
    ids = tokenizer.encode((Path(mimo.__file__).parent / "decode" / "loop.py").read_text())
    prompts = [ids[start : start + 64] for start in range(0, 640, 64)]
    found = llama_cpp_drafting.compare(mimo.BUNDLED, Path(FOLDER), prompts, 32)
    theirs = found["llama.cpp"]
    assert theirs["float32"]["same_texts"] == len(prompts)
    for row in theirs.values():
        assert row["tokens_per_round"] == pytest.approx(found["here"]["tokens_per_round"], rel=0.05)
    assert found["here"]["tokens_per_round"] > 1.2


def test_rounds_are_what_was_not_accepted(tmp_path):
    """Each round gives what was accepted and one token more; the first token is the prefill's."""
    server = tmp_path / "server"
    server.write_text(SERVER)
    server.chmod(0o755)
    with llama_cpp_drafting.serving(server, tmp_path, tmp_path, 7, tmp_path / "log") as complete:
        assert complete([3, 4], 9) == llama_cpp_drafting.Completion([3, 4, 3, 4, 3, 4, 3, 4, 3], rounds=3)


def test_a_server_that_ends_is_one_line(tmp_path):
    """What it printed last is the error."""
    server = tmp_path / "server"
    server.write_text("#!/bin/sh\necho first\necho 'tensor not found' >&2\nexit 3\n")
    server.chmod(0o755)
    with (
        pytest.raises(UserError, match="exit code 3: tensor not found"),
        llama_cpp_drafting.serving(server, tmp_path, tmp_path, 7, tmp_path / "log"),
    ):
        pass
