"""What steps need, made in other processes before the steps come: where making it takes longer than the step itself."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_make: Callable[[int], Any]  # of a worker


class Ahead(Generic[T]):
    """`ahead(step)` is `make(step)`, for one step after the other; with `workers`, `make` must be picklable."""

    def __init__(self, make: Callable[[int], T], workers: int) -> None:
        self._make, self._depth = make, 2 * workers
        self._made: dict[int, Future[T]] = {}
        # Not forked: a process in which XLA has threads may not go on as one of them.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(make,)) if workers else None

    def __call__(self, step: int) -> T:
        if self._pool is None:
            return self._make(step)
        for later in range(step, step + self._depth):
            if later not in self._made:
                self._made[later] = self._pool.submit(_at, later)
        return self._made.pop(step).result()


def _begin(make: Callable[[int], Any]) -> None:
    global _make
    _make = make


def _at(step: int) -> Any:
    return _make(step)
