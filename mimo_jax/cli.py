"""What every script does around its work: one-line errors, exit codes, the persistent compilation cache."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mimo_jax.distributed import leave, stop_if_another_died
from mimo_jax.errors import UserError


def enable_compilation_cache() -> None:
    """Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    import jax

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(home / "mimo_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def need_matplotlib() -> None:
    """Raises, before any work is done, where a plot could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plot: matplotlib is not installed; it comes with the extra: pip install -e '.[plots]'")


def add_drafter_options(parser: argparse.ArgumentParser) -> None:
    """The options that name the drafters to be measured."""
    parser.add_argument(
        "--drafter", action="append", default=[], help="[NAME=]dflash folder; repeat it (default: the checkpoint's)"
    )
    parser.add_argument("--chain", action="append", default=[], help="the same for drafters trained as a chain")


def named_folders(specs: list[str]) -> dict[str, Path]:
    """Folders given as NAME=FOLDER, or as FOLDER, which then is its own name."""
    return {name or folder: Path(folder) for name, _, folder in (spec.rpartition("=") for spec in specs)}


def main_guard(main: Callable[[], object]) -> None:
    """Runs `main`; bad input ends with one line on standard error and exit code 2, Ctrl-C with 130."""
    try:
        enable_compilation_cache()
        main()
        leave()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if "jax" in sys.modules:
            stop_if_another_died(error)
        raise
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
