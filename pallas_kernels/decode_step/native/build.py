"""Compiles the native step for this machine, once, and loads it.

A library per instruction-set path lies in a cache folder, under a name that depends on all it was made from: sources,
generated names, compiler, flags and jaxlib. So an older one, or another's, is never loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pallas_kernels.decode_step.native.names import header

FOLDER = Path(__file__).parent
SOURCES = ("simd.h", "matmul.h", "attention.h", "executor.h", "parts.h", "target.h", "drafter.h", "select.h", "step.cc")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wno-maybe-uninitialized",
)
CACHE = "MIMO_NATIVE_CACHE"  # environment variable: the folder of compiled libraries


class Unavailable(Exception):
    """Why there is no native step here, and what would help."""


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction-set path: the machine and CPU features it needs, and what tells the compiler to use them."""

    machine: str
    features: tuple[str, ...]  # as Linux names them
    flags: tuple[str, ...]


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
# The first that a CPU has is the fastest for it.
PATHS = {
    "avx512_bf16": Isa(
        "x86_64",
        (*_AVX512, "avx512_bf16", "avx512vbmi", "avx512_vnni"),
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi", "-mavx512vnni"),
    ),
    "avx512": Isa("x86_64", _AVX512, ("-march=x86-64-v4",)),
    "avx2": Isa("x86_64", ("avx2", "fma", "f16c"), ("-march=x86-64-v3",)),
    "neon": Isa("aarch64", ("asimd",), ("-march=armv8.2-a",)),
}


def cpu_features() -> set[str]:
    """What the first CPU of this machine can do, in Linux' words."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    return set()


def usable_paths() -> list[str]:
    """The paths that this machine can run, fastest first."""
    features = cpu_features()
    return [
        name for name, isa in PATHS.items() if isa.machine == platform.machine() and features.issuperset(isa.features)
    ]


def library(path: str | None = None) -> Path:
    """The compiled library of a path (default: this machine's fastest); compiles it where there is none."""
    usable = usable_paths()
    if not usable:
        raise Unavailable("this CPU has neither AVX2 nor NEON")
    name = path or usable[0]
    names = (given,) if (given := os.environ.get("CXX")) else ("g++", "clang++", "c++")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise Unavailable(f"no C++ compiler was found ({', '.join(names)}); install one, or name it in $CXX")
    target = cache_folder() / f"step-{name}-{_digest(compiler, name)}.so"
    return target if target.exists() else _compile(compiler, name, target)


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    if given := os.environ.get(CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mimo_jax" / "native"


def _digest(compiler: str, name: str) -> str:
    import jaxlib

    digest = hashlib.sha256()
    for part in (_version(compiler), jaxlib.__version__, *FLAGS, *PATHS[name].flags, header()):
        digest.update(part.encode() + b"\0")
    for source in SOURCES:
        digest.update((FOLDER / source).read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _compile(compiler: str, name: str, target: Path) -> Path:
    import jax

    print("compiling the native step (once for this machine; about 15 seconds)", file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=target.parent)
    except OSError as error:
        raise Unavailable(f"{target.parent} cannot be written ({error.strerror}); name a folder in ${CACHE}") from None
    with work as folder:
        (Path(folder) / "names.h").write_text(header())
        built = Path(folder) / "step.so"
        includes = (f"-I{folder}", f"-I{FOLDER}", f"-isystem{jax.ffi.include_dir()}")
        command = [compiler, *FLAGS, *PATHS[name].flags, *includes, str(FOLDER / "step.cc"), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
            raise Unavailable(f"{compiler} failed: {reason}")
        os.replace(built, target)
    return target


@functools.cache
def load(path: str | None = None) -> ctypes.CDLL:
    """The library of a path; one that is damaged is compiled again."""
    file = library(path)
    try:
        return ctypes.CDLL(str(file))
    except OSError:
        file.unlink(missing_ok=True)
        return ctypes.CDLL(str(library(path)))


@functools.cache
def unavailable() -> str | None:
    """Why this machine has no native step; None if it has."""
    try:
        library()
    except Unavailable as reason:
        return str(reason)
    return None
