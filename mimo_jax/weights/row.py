"""A row of the table of parameters (`weights.params`), and the usual kinds of it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of the model, of every layer, or of every expert of every layer.

    `axes` are the words of `_axis_sizes`, `sharding.MESH_AXES` says which of them devices share. `kind` decides how a
    file stores it: "plain" and "router" (the format's dtypes), "float32", "linear" and "expert" (see `config.model`).
    """

    path: str  # in the parameter tree, below its layer
    name: str  # published, below its layer
    axes: str
    kind: str = "plain"
    optimizer: str = "adamw"  # or "muon"
    is_matrix: bool = False  # `modeling.linear` multiplies by it


def matrix(path: str, name: str, axes: str, kind: str = "plain", optimizer: str = "muon") -> Row:
    return Row(path, name, axes, kind, optimizer, is_matrix=True)


def expert(path: str, name: str, axes: str) -> Row:
    return Row(path, name, axes, "expert", "muon")


def norm(path: str, name: str, axes: str = "width") -> Row:
    return Row(f"{path}/weight", f"{name}.weight", axes)
