"""Mutates the files of a checkpoint and reads it: only a `UserError` or success is allowed, fast and in little memory.

    python -m tests.tools.fuzz --count 100000 --seed 7

A failure prints the case's number; `--first N --count 1` repeats it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax

from mimo_jax.checkpoint.huggingface import open_checkpoint, probe_qkv, read_params
from mimo_jax.cli.memory import current_memory, peak_memory
from mimo_jax.errors import UserError
from tests.checkpoint.samples import random_tensors, save_checkpoint, small

SECONDS, HANG_SECONDS = 1.0, 60
MEMORY_BYTES = 64 << 20
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 1e300)
VALUES = (*NUMBERS, None, True, False, "", "x" * 3000, "../x", "\u0000", "é", [], {}, [[]], {"a": {}}, float("nan"))


def mutate_value(rng: random.Random, value):
    """One random change somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.7:
            return {**value, key: mutate_value(rng, value[key])}
        rest = {k: v for k, v in value.items() if k != key}
        if action < 0.8:
            return rest
        return {**rest, rng.choice([*value, key + "x", "", "\u0000", "n" * 1025]): value[key]}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        action = rng.random()
        if action < 0.6:
            return [*value[:index], mutate_value(rng, value[index]), *value[index + 1 :]]
        return value[:index] + value[index + 1 :] if action < 0.8 else [*value, value[index]] * rng.choice((1, 1, 500))
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 8, -8, 2**32))
    return rng.choice(VALUES)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flips, overwrites, insertions, removals, repetitions and cuts."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 8, 64, 1000)), len(data) - at)
        action = rng.randrange(6)
        if action == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[at : at + length] = rng.randbytes(length)
        elif action == 2:
            data[at:at] = rng.randbytes(length)
        elif action == 3:
            del data[at : at + length]
        elif action == 4:
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def mutate_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a changed header, length field or bytes."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    action = rng.random()
    if action < 0.1:
        return (
            rng.choice((length - 1, length + 1, 0, len(data), 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]
        )
    if action < 0.5:
        header = encode(rng, mutate_value(rng, json.loads(header)))
    elif action < 0.8:
        header = mutate_bytes(rng, header)
    else:
        return mutate_bytes(rng, data)
    return len(header).to_bytes(8, "little") + header + body


def encode(rng: random.Random, value) -> bytes:
    text = json.dumps(value)
    if rng.random() < 0.1 and isinstance(value, dict) and value:  # a key twice
        key = json.dumps(rng.choice(list(value)))
        text = f"{text[:-1]}, {key}: {rng.choice(('1', '{}', 'null', '[' * 5000))}}}"
    return text.encode()


def mutate(rng: random.Random, name: str, data: bytes) -> bytes:
    if name.endswith(".safetensors"):
        return mutate_tensors(rng, data)
    return encode(rng, mutate_value(rng, json.loads(data))) if rng.random() < 0.6 else mutate_bytes(rng, data)


def read_all(directory: Path) -> str:
    """Reads a directory to the end; returns the kind of outcome."""
    try:
        source = open_checkpoint(directory)
        probe_qkv(source, read_params(source))
    except UserError as error:
        message = str(error)
        if "\n" in message or len(message) > 4000:
            raise AssertionError(f"not one short line: {message[:500]!r}") from None
        return "rejected"
    return "accepted"


def reset_peak() -> None:
    """Restarts Linux's count of the most memory held."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def run(count: int, seed: int = 0, first: int = 0) -> dict[str, float]:
    """Reads `count` mutated checkpoints; the first that misbehaves is an AssertionError naming its number."""
    config = small(layer_pattern=(0, 1), moe_pattern=(0, 1), intermediate_size=64, vocab_size=32, num_experts=2)
    outcomes: Counter[str] = Counter()
    slowest = largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        directory = save_checkpoint(Path(folder) / "hf", config, random_tensors(config), shards=2)
        originals = {path.name: path.read_bytes() for path in directory.iterdir()}
        total = sum(map(len, originals.values()))
        targets = [name for name in originals if name != "tokenizer_config.json"]
        assert read_all(directory) == "accepted"
        for case in range(first, first + count):
            rng = random.Random(f"{seed}/{case}")
            name = rng.choice(targets)
            (directory / name).write_bytes(mutate(rng, name, originals[name]))
            reset_peak()
            before, started = current_memory(), time.process_time()
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            try:
                outcomes[read_all(directory)] += 1
            except Exception as error:
                raise AssertionError(f"case {case} of seed {seed} ({name}): {type(error).__name__}: {error}") from error
            faulthandler.cancel_dump_traceback_later()
            seconds, grown = time.process_time() - started, peak_memory() - before
            slowest, largest = max(slowest, seconds), max(largest, grown)
            assert seconds < SECONDS, f"case {case} of seed {seed} ({name}): {seconds:.2f} s"
            limit = 2 * (total + (directory / name).stat().st_size) + MEMORY_BYTES
            assert grown < limit, f"case {case} of seed {seed} ({name}): {grown} bytes"
            (directory / name).write_bytes(originals[name])
    return {**outcomes, "slowest_seconds": round(slowest, 3), "largest_growth": largest}


def arguments(description: str | None) -> argparse.Namespace:
    """How many cases of a fuzzer, of which seed, from which one on."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    return parser.parse_args()


def main() -> None:
    args = arguments(__doc__)
    jax.config.update("jax_platforms", "cpu")
    started = time.monotonic()
    report = run(args.count, args.seed, args.first)
    print(json.dumps({"cases": args.count, "per_second": round(args.count / (time.monotonic() - started)), **report}))


if __name__ == "__main__":
    main()
