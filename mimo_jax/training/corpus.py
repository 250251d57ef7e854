"""Python source found on the machine, as a reproducible training corpus.

Files are deduplicated by content and split by package, so that no held-out file shares a package with a training
file. A manifest with the hash of every file says exactly what went in, and holds those of what came out: token ids
mean nothing without the tokenizer that made them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.checkpoint.files.tensorfile import load_json
from mimo_jax.cli.progress import progress
from mimo_jax.errors import UserError, check_whole
from mimo_jax.files import exclusive, write_atomically
from mimo_jax.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, Tokenizer

MIN_BYTES, MAX_BYTES = 200, 200_000
MAX_LINE = 400  # longer lines are data, not code
MAX_DIGITS = 0.15  # a larger share of digits is a table
TEST_FOLDERS = {"test", "tests", "testing"}  # repetitive, and nobody's idea of code to learn from
HELD_OUT_SHARE = 0.04
PACKAGE_LIMITS = {"train": 12_000_000, "heldout": 1_000_000}  # bytes: no package dominates its split
SPLITS = ("train", "heldout")
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One accepted file: its package, path within the root it was found under, and content hash."""

    package: str
    path: str
    sha256: str
    size: int
    root: Path

    def text(self) -> str:
        return (self.root / self.path).read_text(encoding="utf-8")

    @property
    def split(self) -> str:
        digest = hashlib.sha256(f"split:{self.package}".encode()).digest()
        return "heldout" if int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32 else "train"


def default_roots() -> list[Path]:
    """The standard library and the installed packages of the running interpreter."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def collect(roots: Iterable[Path]) -> list[SourceFile]:
    """Every acceptable `*.py` below `roots`, first copy only, in an order fixed by content (so by nothing local)."""
    seen: set[str] = set()
    sizes: dict[str, int] = {}
    files = []
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if "site-packages" in relative.parts or TEST_FOLDERS & set(relative.parts):
                continue
            source = _accept(root, relative)
            if source is None or source.sha256 in seen:
                continue
            package_size = sizes.get(source.package, 0) + source.size
            if package_size > PACKAGE_LIMITS[source.split]:
                continue
            sizes[source.package] = package_size
            seen.add(source.sha256)
            files.append(source)
    return sorted(files, key=lambda source: source.sha256)


def _accept(root: Path, relative: Path) -> SourceFile | None:
    try:
        data = (root / relative).read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not MIN_BYTES <= len(data) <= MAX_BYTES or max(map(len, text.splitlines())) > MAX_LINE:
        return None
    if sum(character.isdigit() for character in text) > MAX_DIGITS * len(text):
        return None
    package = relative.parts[0].removesuffix(".py")
    return SourceFile(package, relative.as_posix(), hashlib.sha256(data).hexdigest(), len(data), root)


def build(
    out: Path, roots: list[Path], vocab_size: int, tokenizer_bytes: int, tokenizer: Tokenizer | None = None
) -> dict:
    """Writes `tokenizer.json`, `train.bin`, `heldout.bin` (uint16 token ids) and `manifest.json` into `out`.

    A tokenizer of `vocab_size` is trained on the first `tokenizer_bytes`, unless a finished one is given.
    """
    if tokenizer:
        vocab_size = tokenizer.vocab_size
    check_whole("corpus", len(SPECIAL_TOKENS) + 256, 1 << 16, vocab_size=vocab_size)  # every byte; 16 bits
    files = collect(roots)
    by_split = {split: [source for source in files if source.split == split] for split in SPLITS}
    if not all(by_split.values()):
        raise UserError(f"corpus: {len(files)} files found under {len(roots)} roots; both splits need some")
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".lock", f"{out}: another process is building this corpus; wait until it is done"):
        tokenizer = tokenizer or Tokenizer.train(_texts(by_split["train"], tokenizer_bytes), vocab_size)
        tokens = {split: _tokenize(by_split[split], tokenizer, split) for split in SPLITS}
        content = {TOKENIZER: tokenizer.backend.to_str(pretty=True).encode()}
        content |= {_token_file(split): tokens[split].tobytes() for split in SPLITS}
        manifest = {
            "python": sys.version.split()[0],
            "vocab_size": tokenizer.vocab_size,
            "tokens": {split: len(tokens[split]) for split in SPLITS},
            "bytes": {split: sum(source.size for source in by_split[split]) for split in SPLITS},
            "packages": {split: sorted({source.package for source in by_split[split]}) for split in SPLITS},
            "files": [[source.split, source.path, source.size, source.sha256] for source in files],
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in content.items()},
        }
        # The manifest comes first: from then on, whatever a kill leaves of an older corpus does not match.
        write_atomically(out / MANIFEST, json.dumps(manifest, indent=0).encode())
        for name, data in content.items():
            write_atomically(out / name, data)
    return manifest


def _texts(files: list[SourceFile], limit: int) -> Iterator[str]:
    for source in files:
        if limit <= 0:
            return
        limit -= source.size
        yield source.text()


def _tokenize(files: list[SourceFile], tokenizer: Tokenizer, split: str) -> np.ndarray:
    pieces = []
    with progress(f"tokenizing {split}", sum(source.size for source in files), unit="bytes") as bar:
        for start in range(0, len(files), 256):
            batch = files[start : start + 256]
            for ids in tokenizer.encode_batch([source.text() for source in batch]):
                pieces.append(np.asarray([*ids, tokenizer.id_of(END_OF_TEXT)], np.uint16))
            bar.advance(sum(source.size for source in batch))
    return np.concatenate(pieces)


def _token_file(split: str) -> str:
    return f"{split}.bin"


def load_tokens(data: Path, split: str) -> np.ndarray:
    """The token ids of a split, memory-mapped. They and the tokenizer must be what the manifest, if any, says."""
    path = data / _token_file(split)
    if not path.is_file():
        raise UserError(f"{path}: not found; build it with `scripts/train.py corpus --data {data}`")
    size = path.stat().st_size
    if not size or size % 2:
        raise UserError(f"{path}: {size} bytes are no list of 16-bit token ids; build it again")
    _check_built_together(data, (path.name, TOKENIZER))
    return np.memmap(path, np.uint16, mode="r")


def check_vocabulary(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises where tokens are those of another tokenizer; indexing would clamp them in silence."""
    if (largest := tokens.max()) >= vocab_size:
        raise UserError(f"corpus: token {largest} is none of {vocab_size}; build it with the tokenizer of this model")


def _check_built_together(data: Path, names: Iterable[str]) -> None:
    listed = _listed(data)
    if listed is None:
        return
    for name in names:
        if listed.get(name) != digest(data / name):
            raise UserError(
                f"{data / name}: not the one that {MANIFEST} lists, so damaged or of an interrupted build; "
                f"build it again with `scripts/train.py corpus --data {data}`"
            )


def _listed(data: Path) -> dict[str, Any] | None:
    """Name -> SHA-256 of the manifest's files; None where tokens were not built here."""
    path = data / MANIFEST
    if not path.exists():
        return None
    listed = load_json(path.read_bytes(), str(path)).get("sha256")
    if not isinstance(listed, dict):
        raise UserError(f"{path}: lists no SHA-256; build it again with `scripts/train.py corpus --data {data}`")
    return listed


def digest(path: Path) -> str | None:
    """SHA-256 of a file, if there is one."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_same_tokenizer(checkpoint: Path, data: Path) -> None:
    """The same as loaded: a corpus keeps a tokenizer in this library's spelling, not in the bytes of the checkpoint."""
    files = [directory / TOKENIZER for directory in (checkpoint, data)]
    first, second = (Tokenizer.load(file).backend.to_str() for file in files)
    if first != second:
        raise UserError(f"{files[1]} differs from {files[0]}; build the corpus with --tokenizer {files[0]}")


def identity(data: Path) -> dict[str, str | None]:
    """SHA-256 of what a run learns from: by them a run knows its corpus again, and an export its tokenizer.

    `load_tokens`, which every run begins with, has compared what the manifest lists; nothing is read twice.
    """
    files, listed = {"tokenizer": TOKENIZER, "tokens": _token_file("train")}, _listed(data)
    return {what: digest(data / name) if listed is None else listed.get(name) for what, name in files.items()}


def batch_at(tokens: np.ndarray, step: int, batch: int, length: int, seed: int) -> np.ndarray:
    """Batch `step` of an endless walk over shuffled windows: int32 [batch, length + 1]. Depends on nothing else."""
    windows = (len(tokens) - 1) // length
    if windows < batch:
        raise UserError(f"corpus: {len(tokens)} tokens give {windows} windows of {length}; a batch needs {batch}")
    starts = shuffled(windows, step, batch, seed) * length
    return np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int32)


def shuffled(count: int, step: int, batch: int, seed: int) -> np.ndarray:
    """Batch `step` of an endless walk over `count` items, each epoch in an order of its own: indices [batch]."""
    index = np.arange(step * batch, (step + 1) * batch)
    epochs = [int(epoch) for epoch in index // count]
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in set(epochs)}
    return np.array([orders[epoch][i % count] for epoch, i in zip(epochs, index)])
