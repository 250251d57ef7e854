"""A ratio of two totals over texts, and how far it may be off."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float


def ratio(above_N: Float[np.ndarray, "N"], below_N: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """sum(above) / sum(below) over N texts, and the standard error of this ratio estimator."""
    found = above_N.sum() / below_N.sum()
    error = np.std(above_N - found * below_N, ddof=1) * math.sqrt(len(above_N)) / below_N.sum()
    return float(found), float(error)
