"""What Python and C++ must agree on: kinds of rows, sizes of models, where weights lie. C++ gets it as a header."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from pallas_kernels.decode_step.geometry import Drafter, Target
from pallas_kernels.decode_step.native.layout import (
    DRAFT_LAYER_SLOTS,
    DRAFT_TOP_SLOTS,
    FP8_BLOCK,
    GROUP,
    LANES,
    LAYER_SLOTS,
    ORDER,
    TOP_SLOTS,
    Format,
)
from pallas_kernels.decode_step.schedule import FEATURES_PER_UNIT, MOST_SHARES, ROWS_PER_UNIT, Kind


def sizes_of(geometry: Target | Drafter) -> np.ndarray:
    """The whole numbers of a geometry, as C++ reads them: int32, in the order of the fields."""
    values = {name: getattr(geometry, name) for name in _fields(type(geometry), int, bool)}
    if isinstance(geometry, Target):
        values["num_layers"] = len(geometry.layers)
    return np.array(list(values.values()), np.int32)


def numbers_of(geometry: Target | Drafter) -> np.ndarray:
    """The other numbers of a geometry: float32."""
    return np.array([getattr(geometry, name) for name in _fields(type(geometry), float)], np.float32)


def _fields(geometry: type, *types: type) -> list[str]:
    names = {kind.__name__ for kind in types}
    return [field.name for field in dataclasses.fields(geometry) if field.type in names]


def header() -> str:
    """The header `names.h`."""
    numbers = {
        "MOST_SHARES": MOST_SHARES,
        "UNIT": ROWS_PER_UNIT,
        "FEATURES": FEATURES_PER_UNIT,
        "LANES": LANES,
        "GROUP": GROUP,
        "FP8_BLOCK": FP8_BLOCK,
    }
    lines = ["#pragma once", "#include <cstdint>"]
    lines += [f"constexpr int {name} = {value};" for name, value in numbers.items()]
    lines.append(f"constexpr int ORDER[] = {{{', '.join(map(str, ORDER))}}};")
    for names in (Kind, Format):
        lines.append(f"enum {names.__name__} {{ {', '.join(f'{name.name} = {name.value}' for name in names)} }};")
    for prefix, top, layer in (("", TOP_SLOTS, LAYER_SLOTS), ("DRAFT_", DRAFT_TOP_SLOTS, DRAFT_LAYER_SLOTS)):
        lines.append(_slots(f"{prefix}TOP_SLOTS", f"{prefix}SLOT_", top))
        lines.append(_slots(f"{prefix}LAYER_SLOTS", f"{prefix}SLOT_", layer))
    for geometry in (Target, Drafter):
        sizes = [*_fields(geometry, int, bool), *(["num_layers"] if geometry is Target else [])]
        lines.append(_struct(f"{geometry.__name__}Sizes", "int32_t", sizes))
        lines.append(_struct(f"{geometry.__name__}Numbers", "float", _fields(geometry, float)))
    return "\n".join(lines) + "\n"


def _slots(count: str, prefix: str, slots: Iterable[str]) -> str:
    names = ", ".join(prefix + slot.upper() for slot in slots)
    return f"enum {{ {names}, {count} }};"


def _struct(name: str, kind: str, fields: Iterable[str]) -> str:
    return f"struct {name} {{ {kind} {', '.join(fields)}; }};"
