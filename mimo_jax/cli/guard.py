"""What every script does around its work: one-line errors, exit codes, the persistent compilation cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from mimo_jax.cli.distributed import leave, stop_if_another_died
from mimo_jax.errors import UserError


def enable_compilation_cache() -> None:
    """Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    import jax

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(home / "mimo_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def main_guard(main: Callable[[], object]) -> None:
    """Runs `main`; bad input ends with one line on standard error and exit code 2, Ctrl-C with 130."""
    try:
        enable_compilation_cache()
        main()
        leave()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("mimo_jax", "pallas_kernels"):
            raise
        print(f"error: {error.name} is not installed; `make install` installs what all commands need", file=sys.stderr)
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
