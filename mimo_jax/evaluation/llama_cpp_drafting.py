"""The published part of a drafter in llama.cpp: our folder, converted and served by llama.cpp's own programs.

Its converter takes a checkpoint as it lies there, but for two things that no file could tell it. It knows how a
tokenizer splits text by a hash of token ids, so that every new vocabulary is unknown to it: ours is split as Qwen2's.
And it expects three MTP layers, as published models have them: where there are fewer, they have to be left out.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimo_jax.checkpoint.dflash import FOLDER
from mimo_jax.decode.sampling import Greedy
from mimo_jax.errors import UserError
from mimo_jax.evaluation import acceptance, llama_cpp
from mimo_jax.loading import Model, load, with_drafter

SERVER, QUANTIZE = "llama-server", "llama-quantize"
_CONVERTER = """
import runpy, sys
tree = sys.argv.pop(1)
sys.path[:0] = [tree, tree + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(tree + "/convert_hf_to_gguf.py", run_name="__main__")
"""
_CACHES = ("-ctk", "f32", "-ctv", "f32", "-ctkd", "f32", "-ctvd", "f32", "-fa", "off")
_START_SECONDS, _POLL_SECONDS = 120, 0.1
_ROWS = 20  # prompts per batch here


@dataclasses.dataclass(frozen=True)
class Completion:
    """Greedy tokens after a prompt: the first by the prefill, the others in `rounds` of drafting and verifying."""

    tokens: list[int]
    rounds: int


Complete = Callable[[list[int], int], Completion]  # prompt, and how many tokens


def convert(source: Path, checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """Target and drafter as GGUF, by the converter of llama.cpp's `source`; all but MXFP4 experts in float32."""
    target, drafter = folder / "target.gguf", folder / "drafter.gguf"
    converter = (sys.executable, "-c", _CONVERTER, source)
    llama_cpp.run(*converter, checkpoint, "--no-mtp", "--outtype", "f32", "--outfile", target)
    options = ("--target-model-dir", checkpoint, "--outtype", "f32", "--outfile", drafter)
    llama_cpp.run(*converter, checkpoint / FOLDER, *options)
    return target, drafter


@contextmanager
def serving(server: Path, target: Path, drafter: Path, drafts: int, log: Path) -> Iterator[Complete]:
    """llama.cpp's server while the block runs, drafting `drafts` tokens a round with DFlash; its cache is float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    drafting = ("-md", drafter, "--spec-type", "draft-dflash", "--spec-draft-n-max", drafts, "--spec-draft-p-min", 0)
    where = ("--host", "127.0.0.1", "--port", port, "-np", 1)
    threads = ("-t", 1, "-td", 1)  # several would spin while they wait for each other
    words = [str(word) for word in (server, "-m", target, *drafting, *_CACHES, *where, *threads)]
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output)
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield lambda prompt, count: _complete(f"http://127.0.0.1:{port}/completion", prompt, count)
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = (log.read_text().strip() or "it printed nothing").splitlines()[-1]
            raise UserError(f"{SERVER}: exit code {process.returncode}: {last[:300]}")
        try:
            urllib.request.urlopen(url).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(_POLL_SECONDS)
    raise UserError(f"{SERVER}: not ready after {_START_SECONDS} s")


def _complete(url: str, prompt: list[int], count: int) -> Completion:
    asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False, "return_tokens": True}
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)
    tokens, accepted = found["tokens"], found["timings"].get("draft_n_accepted", 0)
    return Completion(tokens, len(tokens) - 1 - accepted)  # a round gives what was accepted and a token of the target


def ours(checkpoint: Path) -> Model:
    """The modules in float32, drafting with the published part of the checkpoint's drafter."""
    plain = load(checkpoint, layout="dense", draft="none")
    plain = dataclasses.replace(plain, config=dataclasses.replace(plain.config, dtype="float32"))
    return with_drafter(plain, checkpoint / FOLDER, extras=False)


def compare(checkpoint: Path, folder: Path, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Texts of `count` tokens, and tokens per round, of the same drafter here and in the llama.cpp built in `folder`.

    There with experts as they are, whose inputs llama.cpp rounds to 8 bits, and with experts expanded to float32.
    """
    model = ours(checkpoint)
    server, quantize = (llama_cpp.build(folder, program=program) for program in (SERVER, QUANTIZE))
    source = llama_cpp.source_of(folder)
    if source is None:
        raise UserError(f"{folder}: holds {SERVER}, but not what it was built from")
    results = acceptance.continue_all(model, prompts, Greedy(), count, min(_ROWS, len(prompts)), "here")
    expected = [Completion(result.tokens, result.acceptance.rounds) for result in results]
    about = {"package": f"{llama_cpp.PACKAGE} {llama_cpp.VERSION}", "prompts": len(prompts), "max_tokens": count}
    record: dict[str, Any] = {**about, "here": _summary(expected), "llama.cpp": {}}
    with tempfile.TemporaryDirectory() as name:
        packed, drafter = convert(source, checkpoint, Path(name))
        expanded, log = Path(name) / "expanded.gguf", Path(name) / "server.log"
        llama_cpp.run(quantize, "--allow-requantize", packed, expanded, "F32")
        for experts, target in (("MXFP4", packed), ("float32", expanded)):
            with serving(server, target, drafter, model.drafter.block_size - 1, log) as complete:
                found = [complete(prompt, count) for prompt in prompts]
            record["llama.cpp"][experts] = _summary(found) | _agreement(expected, found)
    return record


def _summary(found: list[Completion]) -> dict[str, Any]:
    tokens, rounds = sum(len(row.tokens) - 1 for row in found), sum(row.rounds for row in found)
    return {"rounds": rounds, "tokens_per_round": tokens / rounds}


def _agreement(expected: list[Completion], found: list[Completion]) -> dict[str, Any]:
    """How many texts are equal, how many of them in as many rounds, and where the others part."""
    pairs = list(zip(expected, found))
    same = sum(one.tokens == other.tokens for one, other in pairs)
    return {"same_texts": same, "same_rounds": sum(one == other for one, other in pairs), "parts_at": _parts(pairs)}


def _parts(pairs: list[tuple[Completion, Completion]]) -> list[int]:
    """Indices of the first differing tokens, sorted."""
    rows = [[a == b for a, b in zip(one.tokens, other.tokens)] for one, other in pairs if one.tokens != other.tokens]
    return sorted([*row, False].index(False) for row in rows)
