"""Attention of new tokens over a long cache: one op, `attend_long`, for every backend."""

from pallas_kernels.attention.api import BACKENDS, attend_long

__all__ = ["BACKENDS", "attend_long"]
