"""Progress bars on standard error, for anything a person would otherwise wait for blindly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bar:
    """One running bar: `advance` by units done, `describe` what is being done."""

    def __init__(self, bars: Progress, task) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: float = 1) -> None:
        self._bars.advance(self._task, amount)

    def describe(self, text: str) -> None:
        self._bars.update(self._task, description=text)


@contextmanager
def progress(title: str, total: float, unit: str = "steps", done: float = 0) -> Iterator[Bar]:
    """A bar of `total` units ("bytes" are shown as sizes and speed)."""
    counted: list[ProgressColumn] = [MofNCompleteColumn()]
    if unit == "bytes":
        counted = [DownloadColumn(), TransferSpeedColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bars:
        yield Bar(bars, bars.add_task(title, total=total, completed=int(done)))
