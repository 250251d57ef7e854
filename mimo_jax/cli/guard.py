"""What every script does around its work: one-line errors, exit codes, the persistent compilation cache."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mimo_jax.cli.distributed import leave, stop_if_another_died
from mimo_jax.errors import UserError

OURS = ("mimo_jax", "pallas_kernels")
INTERRUPTED = 130


def main_guard(main: Callable[[], object]) -> None:
    """Runs `main`; whatever is wrong ends with one line on standard error and exit code 2, Ctrl-C with 130."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _interrupted)
    try:
        _check_streams()
        enable_compilation_cache()
        try:
            main()
            leave()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        _discard_unwritten(sys.stdout)
        sys.exit(0)
    except Exception as error:
        _stop(error)


def enable_compilation_cache() -> None:
    """Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    try:
        import jax
    except ValueError as error:  # of a JAX_ variable
        raise UserError(f"jax: {error}") from None

    jax.config.update("jax_compilation_cache_dir", _cache_folder())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _cache_folder() -> str | None:
    """None for a user without a home: folders that all may write are no place for programs."""
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return named
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return str(home / "mimo_jax" / "compiled")


def _interrupted(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C unwinds, so that temporary files go. A second ends at once, and so does one during an import:
    what is imported would make something else of the exception.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _check_streams() -> None:
    """Python has None for a descriptor that is closed, and what is printed on stderr then goes to stdout."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
        raise UserError("standard output is closed; results are written there (> /dev/null drops them)")
    streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # what its encoding lacks is no reason to stop


def _stop(error: Exception) -> NoReturn:
    if isinstance(error, RuntimeError):
        stop_if_another_died(error)
    reason = explained(error)
    if reason is None and os.environ.get("MIMO_TRACEBACK"):
        raise error
    _discard_unwritten(sys.stdout)
    fault = f"a fault of this program, {type(error).__name__}: {error}; MIMO_TRACEBACK=1 shows where"
    with contextlib.suppress(OSError):
        print(f"error: {_one_line(fault if reason is None else reason)}", file=sys.stderr)
    _discard_unwritten(sys.stderr)
    sys.exit(2)


def explained(error: Exception) -> str | None:
    """What the user or the machine is at fault for; None for everything else."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OURS:
        return f"{error.name} is not installed; `make install` installs what all commands need"
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {error.strerror or error}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"memory: there is not enough for this ({str(error) or 'refused by the system'})"
    return _absent_platform()


def _absent_platform() -> str | None:
    """Why JAX has no device: it says so by a bare AssertionError, wherever the first one is asked for."""
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = f" ({error})" if str(error) else ""
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: no such device here{reason}; try another, or cpu"
    return None


def _discard_unwritten(stream: Any) -> None:
    """Drops what a stream refuses to write: Python would try again at its end, and say so."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(text: str) -> str:
    """Names from files and arguments may hold line ends, and codes that terminals obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
