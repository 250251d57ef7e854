"""The backends of an op: modules of its package, each with the op itself and with `unsupported`, which takes a call."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels.devices import capability

Shaped = jax.Array | np.ndarray | jax.ShapeDtypeStruct  # a backend is chosen by shapes and dtypes alone


@dataclasses.dataclass(frozen=True)
class Backends:
    """Those of one package, the fastest first; the last one serves every call, and is all that CPUs have."""

    package: str
    names: tuple[str, ...]

    def module(self, name: str) -> Any:
        """Imported when needed, for Pallas takes its time. ValueError, with the known names, where there is none."""
        if name not in self.names:
            raise ValueError(f"backend {name!r} is unknown; known: {', '.join(self.names)}")
        return importlib.import_module(f"{self.package}.{name}")

    def choose(self, *call: Any) -> str:
        """The fastest that serves the call on JAX's default device."""
        return self.names[-1] if capability() is None else next(self._able(*call))

    def serving(self, name: str | None, *call: Any) -> Any:
        """The module of the backend of that name, or of the fastest; NotImplementedError where it does not serve."""
        if name is None:
            return self.module(self.choose(*call))
        if (reason := self.module(name).unsupported(*call)) is not None:
            able = ", ".join(self._able(*call))
            raise NotImplementedError(f"backend {name!r} cannot serve this call: {reason}; {able} can")
        return self.module(name)

    def _able(self, *call: Any) -> Iterator[str]:
        return (name for name in self.names if self.module(name).unsupported(*call) is None)
