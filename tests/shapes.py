"""Checks the shapes and dtypes of signatures while tests run: see `conftest.py`."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_CHECKED = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float


def check(function: Callable) -> Callable:
    """Checks calls, but no constructor of a dataclass: JAX puts shardings, axes and whatever else into its trees."""
    return function if function.__name__ == "__init__" else _CHECKED(function)
