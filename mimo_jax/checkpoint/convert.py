"""Conversion between the published layouts and Orbax, and `verify`; with progress and the memory it took."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mimo_jax.checkpoint import huggingface
from mimo_jax.checkpoint.audio_tokenizer import audio_tokenizer_files
from mimo_jax.checkpoint.dflash import drafter_files
from mimo_jax.checkpoint.export import fill_checkpoint
from mimo_jax.checkpoint.files.tensorfile import as_bytes, inside, read_bytes
from mimo_jax.checkpoint.gguf import gguf_files
from mimo_jax.checkpoint.huggingface import Checkpoint
from mimo_jax.checkpoint.manifest import MANIFEST, new_directory, verify_directory
from mimo_jax.checkpoint.read import read
from mimo_jax.cli.memory import current_memory, peak_memory, return_freed_memory
from mimo_jax.cli.progress import progress
from mimo_jax.config.model import PUBLISHED
from mimo_jax.errors import UserError
from mimo_jax.sharding import MeshShape, check_fits, make_mesh, parameter_sharding
from mimo_jax.weights import Params
from mimo_jax.weights.params import ShardingOf, array_bytes, weights

# Files that go along with the weights unchanged. Code never does.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "README.md",
    "LICENSE",
)
_MAX_CARRIED_BYTES = 1 << 28


def carried_files(directory: Path) -> dict[str, bytes | Path]:
    """What a checkpoint keeps through every conversion: its tokenizers, other small files, and its drafter."""
    if directory.is_file():
        return gguf_files(directory)
    present = [inside(directory, name) for name in CARRIED if (directory / name).exists()]
    small = {path.name: read_bytes(path, _MAX_CARRIED_BYTES) for path in present}
    return {**small, **drafter_files(directory), **audio_tokenizer_files(directory)}


def to_orbax(source: Path, destination: Path, overwrite: bool = False) -> dict[str, Any]:
    """Converts a Hugging Face directory; returns what was found and measured."""
    from mimo_jax.checkpoint.orbax import fill_orbax  # the other conversions do without Orbax

    _check_apart(source, destination)
    with new_directory(destination, overwrite) as folder:
        _check_source(source)
        opened = huggingface.open_checkpoint(source)
        parts = _split_for(opened)
        return_freed_memory()
        base, held = current_memory(), array_bytes(opened.weights())
        print(f"layout: {opened.describe()}", file=sys.stderr)
        with progress("reading", opened.nbytes, "bytes") as bar:
            params = huggingface.read_params(opened, parts, bar.advance)
        heads = huggingface.probe_qkv(opened, params)
        print(f"probe: {heads} QKV heads recomputed from the file's bytes, all equal", file=sys.stderr)
        with progress("writing", held, "bytes") as bar:
            fill_orbax(folder, opened.config, opened.file_format, params, carried_files(source), bar.advance)
    return {
        "storage": opened.file_format.name,
        "qkv_layout": opened.qkv_order,
        "qkv_chunks": opened.qkv_chunks,
        "probed_heads": heads,
        "tensors": len(opened.files),
        "skipped": opened.skipped,
        **memory_report(base, held),
    }


def _split_for(opened: huggingface.HuggingFaceCheckpoint) -> ShardingOf | None:
    """Arrays in the parts of tensor parallelism over eight devices, or as near to that as model and devices allow.

    Orbax writes a part as a chunk of its own and reads whole chunks, so a device reads what it needs and nothing else.
    """
    for ways in (8, 4, 2):
        try:
            mesh = make_mesh(MeshShape(tensor=ways))
            check_fits(opened.config, opened.file_format, mesh)
        except UserError:
            continue
        return partial(parameter_sharding, mesh=mesh)
    return None


def to_huggingface(
    source: Path,
    destination: Path,
    overwrite: bool = False,
    params_of: Callable[[Checkpoint], Params] = lambda found: found.params,
    files: Mapping[str, bytes | Path] | None = None,
) -> dict[str, Any]:
    """Converts an Orbax model directory (or re-exports a Hugging Face one) to the FP4-DFlash layout.

    `params_of` gives the parameters to write; what of them is not yet as that layout stores it is rounded. `files` go
    along with them instead of the source's own.
    """
    _check_apart(source, destination)
    with new_directory(destination, overwrite) as folder:
        _check_source(source)
        return_freed_memory()
        base = current_memory()
        found = read(source)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(found.params))
        stored = found.file_format.of("expert")
        if stored != "mxfp4":
            print(f"experts are stored as {stored}: rounding them to MXFP4", file=sys.stderr)
        params = params_of(found)
        with progress("writing", array_bytes(weights(found.config, PUBLISHED)), "bytes") as bar:
            files = carried_files(source) if files is None else files
            fill_checkpoint(folder, found.config, params, dict(files), bar.advance)
    return {"storage": PUBLISHED.name, "from": found.file_format.name, **memory_report(base, held)}


def verify(directory: Path) -> dict[str, Any]:
    """Checks every file and every tensor against the manifest; the first difference is an error."""
    manifest = verify_directory(directory)
    if manifest["kind"] == "orbax":
        from mimo_jax.checkpoint.orbax import verify_leaves

        verify_leaves(directory, manifest["tensors"])
    elif manifest["kind"] == "huggingface":
        _verify_tensors(directory, manifest["tensors"])
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    return {"kind": manifest["kind"], "files": len(manifest["files"]), "bytes": total, "verified": True}


def _verify_tensors(directory: Path, digests: dict[str, str]) -> None:
    opened = huggingface.open_checkpoint(directory)
    if opened.files.keys() != digests.keys():
        raise UserError(f"{directory}: holds {len(opened.files)} tensors, the manifest {len(digests)}")
    for name, file in opened.files.items():
        if hashlib.sha256(as_bytes(file.read(name))).hexdigest() != digests[name]:
            raise UserError(f"{file.path}: tensor {name} differs from the manifest's SHA-256")
        file.release(name)


def _check_apart(source: Path, destination: Path) -> None:
    """The destination may become another directory at the end: it is not the source, in it, or around it."""
    if _holds(source, destination) or _holds(destination, source):
        raise UserError(f"{destination}: lies in the source, or the source in it; choose another place")


def _holds(outer: Path, inner: Path) -> bool:
    """Whether `inner` is `outer` or lies in it, by whatever names."""
    inner = inner.resolve()
    return outer.exists() and any(folder.exists() and folder.samefile(outer) for folder in (inner, *inner.parents))


def _check_source(source: Path) -> None:
    """What was damaged after it was written here would otherwise come out with a manifest that says it is whole."""
    if (source / MANIFEST).exists():
        verify_directory(source)


def memory_report(base: int, held: int) -> dict[str, Any]:
    """Peak memory above `base` (the interpreter and its libraries) beside the bytes of the arrays held."""
    above = peak_memory() - base
    return {"array_bytes": held, "peak_rss": peak_memory(), "peak_over_base": above, "ratio": round(above / held, 3)}
