"""Attention of new tokens over a long cache: one op, `attend_long`, for every backend."""

from pallas_kernels.attention.api import BACKENDS, attend_long
from pallas_kernels.attention.reference import CHUNK, scores

__all__ = ["BACKENDS", "CHUNK", "attend_long", "scores"]
