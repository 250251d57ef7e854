"""What the metrics learn of a request."""

from __future__ import annotations

import time

from mimo_jax.serving.http.metrics import Metrics
from mimo_jax.serving.requests import TokenRequest, Update, Usage


class Record:
    """Counts a request's updates for the metrics, whether anybody reads them or not."""

    def __init__(self, metrics: Metrics, request: TokenRequest) -> None:
        self._metrics, self._request = metrics, request
        self._arrivals: list[list[tuple[float, int]]] = [[] for _ in range(request.samples)]
        self._usages: list[Usage] = []

    def add(self, update: Update) -> None:
        if update.tokens:
            self._arrivals[update.sample].append((time.monotonic(), len(update.tokens)))
        if update.finish and update.usage:
            self._metrics.observe(update.usage, self._arrivals[update.sample])
            self._usages.append(update.usage)
            if len(self._usages) == self._request.samples:
                self._metrics.usage(self._request.account, *self._usages)
