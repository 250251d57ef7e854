"""`scripts/convert.py quantize`, from a tiny BF16 checkpoint to MXFP4 and back into memory."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mimo_jax.calibration.convert import quantize, quantize_calibrated
from mimo_jax.checkpoint.convert import to_huggingface, verify
from mimo_jax.checkpoint.read import read
from mimo_jax.config.model import PUBLISHED, FileFormat
from mimo_jax.errors import UserError
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.weights import MxTensor
from tests.checkpoint.samples import load_file, random_tensors, save_checkpoint, small

ROOT = Path(__file__).parents[2]
CONFIG = small(vocab_size=262, max_position=32)
DENSE = FileFormat("dense", "bfloat16")
WORDS = "def return for in if not else while import from class self yield lambda try except with as".split()


def some_text(words: int) -> str:
    chosen = random.Random(3).choices(WORDS, k=words)
    return " ".join(chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """bf16 (a checkpoint with unquantised experts), fp4 (one with MXFP4 experts), text.txt, and texts/ of two files."""
    folder = tmp_path_factory.mktemp("quantize")
    for name, file_format in (("bf16", DENSE), ("fp4", PUBLISHED)):
        save_checkpoint(folder / name, CONFIG, random_tensors(CONFIG, file_format), file_format)
        Tokenizer.train([some_text(50)], CONFIG.vocab_size).save(folder / name / "tokenizer.json")
    (folder / "text.txt").write_text(some_text(400))
    (folder / "texts" / "deeper").mkdir(parents=True)
    (folder / "texts" / "one.py").write_text(some_text(200))
    (folder / "texts" / "deeper" / "two.md").write_text(some_text(200))
    (folder / "texts" / "picture.png").write_bytes(b"\x89PNG\xff")
    return folder


def run_script(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), "quantize", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def tensors_of(directory: Path) -> dict:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_checkpoint_is_calibrated(folder: Path, tmp_path: Path) -> None:
    """The command writes a whole checkpoint in the published layout; only experts differ from plain rounding, and the
    last line says how much is lost by either.
    """
    done = run_script(folder / "bf16", tmp_path / "out", "--calibrate", folder / "texts", "--windows", 16)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["destination"] == str(tmp_path / "out") and report["storage"] == "mxfp4"
    assert report["tokens"] == 14 * CONFIG.max_position
    for found in report["error"].values():
        assert 0 < found["calibrated"] < found["plain"]
    assert verify(tmp_path / "out")["verified"]
    found = read(tmp_path / "out")
    assert found.file_format == PUBLISHED and isinstance(found.params["layers_1"]["moe"]["down"], MxTensor)

    to_huggingface(folder / "bf16", tmp_path / "plain")
    ours, plain = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert ours.keys() == plain.keys()
    differing = {name for name in ours if ours[name] != plain[name]}
    assert differing and all(".mlp.experts." in name for name in differing)
    assert {name for name in ours if ".experts." in name and name.endswith(".weight")} <= differing
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "bf16" / "tokenizer.json").read_bytes()


def test_it_gives_the_same_bytes_again(folder: Path, tmp_path: Path) -> None:
    """Nothing in it is random."""
    for name in ("one", "two"):
        quantize_calibrated(folder / "bf16", tmp_path / name, folder / "text.txt", 8)
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")


def test_without_a_text_it_rounds_plainly(folder: Path, tmp_path: Path) -> None:
    """Byte for byte what `to-hf` writes."""
    quantize(folder / "bf16", tmp_path / "out")
    to_huggingface(folder / "bf16", tmp_path / "plain")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "plain")


def test_experts_of_an_fp8_checkpoint_are_calibrated(folder: Path, tmp_path: Path) -> None:
    """The published FP8 layout is a source, too: what is not an expert keeps its bytes."""
    file_format = FileFormat("fp8", "bfloat16")
    save_checkpoint(tmp_path / "fp8", CONFIG, random_tensors(CONFIG, file_format), file_format)
    (tmp_path / "fp8" / "tokenizer.json").write_bytes((folder / "bf16" / "tokenizer.json").read_bytes())
    report = quantize_calibrated(tmp_path / "fp8", tmp_path / "out", folder / "text.txt", 8)
    assert report["from"] == "fp8" and np.isfinite(report["error"]["heldout"]["calibrated"])
    before, after = tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if ".experts." not in name)


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        ("bf16", "absent.txt", "absent.txt: no file and no folder of files"),
        ("bf16", "empty.txt", "empty.txt: holds no UTF-8 text"),
        ("bf16", "binary.bin", "binary.bin: holds no UTF-8 text"),
        ("bf16", "empty_folder", "empty_folder: no file and no folder of files"),
        ("bf16", "short.txt", "tokens of text; calibration needs 256 or more"),
        ("fp4", "text.txt", "fp4: its experts are in MXFP4 already"),
        ("dense", "text.txt", "dense: has no layer with experts"),
        ("absent", "text.txt", "absent: not found"),
        ("no_tokenizer", "text.txt", "no_tokenizer: has no tokenizer.json"),
    ],
)
def test_bad_input_is_one_line(folder: Path, tmp_path: Path, source: str, text: str, message: str) -> None:
    """It names what is wrong, and nothing is left behind."""
    (folder / "empty.txt").write_text("")
    (folder / "binary.bin").write_bytes(b"\xff\xfe\x00\x80")
    (folder / "empty_folder").mkdir(exist_ok=True)
    (folder / "short.txt").write_text(some_text(20))
    for name, config in (("dense", small(vocab_size=262, moe_pattern=(0, 0, 0))), ("no_tokenizer", CONFIG)):
        if name == source and not (folder / name).exists():
            save_checkpoint(folder / name, config, random_tensors(config, DENSE), DENSE)
    with pytest.raises(UserError, match=message) as raised:
        quantize_calibrated(folder / source, tmp_path / "out", folder / text, 8)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_the_command_ends_with_code_2(folder: Path, tmp_path: Path) -> None:
    """One line on standard error; a destination that exists is left as it is."""
    (tmp_path / "out").mkdir()
    done = run_script(folder / "bf16", tmp_path / "out", "--calibrate", folder / "text.txt")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "already exists" in done.stderr
    assert not list((tmp_path / "out").iterdir())
