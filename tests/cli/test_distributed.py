"""Two processes with four simulated devices each are one machine with eight; when one dies, the other stops."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mimo_jax.checkpoint.convert import to_orbax
from mimo_jax.cli.distributed import HEARTBEAT_SECONDS
from tests.checkpoint.samples import random_tensors, save_checkpoint, small

ROOT = Path(__file__).parents[2]
START = 240  # seconds that two cores may take to compile for eight devices


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def start(command: list[str], devices: int) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_are_one_machine(tmp_path):
    """Each of two processes reads half of the split bytes and no more, and both generate what one process does."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "moe_intermediate_size": 512, "vocab_size": 2048}
    config = small(num_experts=16, **sizes)
    directory = save_checkpoint(tmp_path / "hf", config, random_tensors(config))
    to_orbax(directory, tmp_path / "orbax")
    script = [str(ROOT / "tests" / "tools" / "two_processes.py"), str(directory), str(tmp_path / "orbax"), free_port()]
    processes = [start([*script, "2", str(index)], 4) for index in range(2)] + [start([*script, "1", "0"], 8)]
    outputs = [process.communicate(timeout=START) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    first, second, alone = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    assert first["tokens"] == second["tokens"] == alone["tokens"]
    assert first["checksum"] + second["checksum"] == alone["checksum"]
    assert min(first["probed"], second["probed"]) == alone["probed"]
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    for process in (first, second):
        replicated = process["read"] - alone["read"] / 2
        assert 0 < replicated < 0.02 * total
        assert process["orbax_same"] and abs(process["orbax_read"] - process["read"]) < 0.01 * total
        assert process["read"] < 0.52 * total


def test_two_processes_train_as_one_device(tmp_path):
    """The same command, split over two processes of two devices each: one log, and one device's loss and gradient."""
    np.random.default_rng(0).integers(0, 4096, 4000).astype(np.uint16).tofile(tmp_path / "train.bin")
    command = [str(ROOT / "scripts" / "train.py"), "pretrain", "--data", str(tmp_path), "--steps", "1"]
    command += ["--batch", "8", "--length", "16", "--run"]
    split = ["--data-parallel", "2", "--tensor-parallel", "2", "--num-processes", "2", "--coordinator", free_port()]
    together = [start([*command, str(tmp_path / "two"), *split, "--process-id", str(index)], 2) for index in range(2)]
    outputs = [process.communicate(timeout=START) for process in together]
    alone = start([*command, str(tmp_path / "one")], 1)
    outputs.append(alone.communicate(timeout=START))
    assert [process.returncode for process in (*together, alone)] == [0, 0, 0], outputs
    two, one = (json.loads((tmp_path / run / "log.jsonl").read_text()) for run in ("two", "one"))
    for metric in ("loss", "mtp_loss", "gradient_norm"):
        assert two[metric] == pytest.approx(one[metric], rel=1e-4)


def test_when_one_process_dies_the_other_stops():
    """A killed process ends the others with one line and exit code 1, within a minute, whatever they were doing."""
    address = free_port()
    command = [str(ROOT / "scripts" / "generate.py"), "--prompt", "def f(x):", "--max-tokens", "900", "--draft", "none"]
    command += ["--tensor-parallel", "8", "--coordinator", address, "--num-processes", "2", "--process-id"]
    survivor, victim = (start([*command, str(index)], 4) for index in range(2))
    assert survivor.stdout is not None
    shown = ""
    while "def f(x):" not in shown:  # after what Gloo has to say; now it has found the other, and is at work
        piece = survivor.stdout.read(1)
        assert piece, survivor.communicate()
        shown += piece
    victim.kill()
    killed = time.monotonic()
    _, errors = survivor.communicate(timeout=HEARTBEAT_SECONDS + 60)
    victim.communicate()
    assert survivor.returncode == 1, errors
    assert time.monotonic() - killed < HEARTBEAT_SECONDS + 40
    assert "error: another process has stopped, so process 0 stops too" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "localhost:1"], "belong together"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"], "--process-id 2 must lie in 0..1"),
        (["--tensor-parallel", "4"], "needs 4 devices; 1 found"),
        (["--tensor-parallel", "0"], "tensor=0 must be a positive integer"),
    ],
)
def test_bad_options_are_one_line(options, message):
    """Options that fit no set of processes or devices end with exit code 2 and one line."""
    process = start([str(ROOT / "scripts" / "generate.py"), "--prompt", "x", *options], 1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors
