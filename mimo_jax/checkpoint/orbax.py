"""Orbax checkpoints (the v1 API): a directory appears by rename when it is complete, and is always restored through an
abstract tree, so that the same checkpoint opens on any number of devices."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mimo_jax.errors import UserError


def save_tree(path: Path, tree: Any, metadata: dict | None = None) -> None:
    """Writes `tree` to the new directory `path`; until the last rename, nothing called `path` exists."""
    try:
        ocp.save(path.absolute(), tree, custom_metadata=metadata)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror or error})") from None


def restore_tree(path: Path, abstract: Any) -> Any:
    """Reads a tree of `jax.ShapeDtypeStruct` leaves; those without a sharding land on the first device."""
    if not path.is_dir():
        raise UserError(f"{path}: not found; expected an Orbax checkpoint directory")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here), abstract
    )
    try:
        return ocp.load(path.absolute(), placed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{path}: not a complete checkpoint of this model ({reason[0] if reason else error!r})") from None


def steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint below `directory`, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and entry.is_dir())


def save_step(directory: Path, step: int, tree: Any, keep: int = 2) -> None:
    """Saves `directory/step` and drops all but the newest `keep`. A kill at any point leaves only complete steps."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in [*directory.glob("*.orbax-checkpoint-tmp*"), *directory.glob("trash-*")]:
        shutil.rmtree(leftover)
    if step not in steps(directory):
        save_tree(directory / f"{step:08d}", tree)
    for old in steps(directory)[:-keep]:
        # Out of sight first: deleting in place would leave a listed step that cannot be restored.
        trash = directory / f"trash-{old:08d}"
        (directory / f"{old:08d}").rename(trash)
        shutil.rmtree(trash)


def restore_latest(directory: Path, abstract: Any) -> Any:
    """The newest step's tree."""
    found = steps(directory)
    if not found:
        raise UserError(f"{directory}: holds no complete checkpoint")
    return restore_tree(directory / f"{found[-1]:08d}", abstract)
