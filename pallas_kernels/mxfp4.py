"""MXFP4: the one place that knows nibble order, element codes and scale bias.

OCP MX v1.0: 32 E2M1 elements along the contraction axis share one E8M0 scale byte. A byte holds two elements, the
even one in the low nibble. All arithmetic on scales is integer arithmetic on float32 exponent fields: log2 and exp2
are inexact in XLA. Every function takes numpy or JAX arrays and answers in kind; XLA on CPU flushes subnormals, numpy
does not, which touches only blocks whose scale byte is 0 or 1.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

BLOCK = 32
NAN_SCALE = 0xFF
SCALE_RULES = ("even", "floor", "ceil6")

# The smallest float32 mantissa field at which a rule rounds the block maximum's exponent up.
# even: 1.75 (Quark, compressed-tensors, torchao EVEN); ceil6: above 1.5 (ModelOpt, torchao RCEIL); floor: never (OCP).
_ROUND_UP_AT = {"even": 0x600000, "floor": 0x800000, "ceil6": 0x400001}
_ELEMENT_EMAX = 2  # 6 = 1.5 * 2**2 is the largest E2M1 magnitude
_INFINITY_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000


def _namespace(x: Any) -> ModuleType:
    return np if isinstance(x, np.ndarray) else jnp


def scale_bytes(amax: Any, rule: str = "even") -> Any:
    """E8M0 bytes for block maxima `amax` (float32, finite, >= 0): uint8 in 0..253. An all-zero block gets byte 0."""
    if rule not in _ROUND_UP_AT:
        raise ValueError(f"scale rule {rule!r} is unknown; known: {', '.join(SCALE_RULES)}")
    xp = _namespace(amax)
    bits = amax.view(np.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) >= _ROUND_UP_AT[rule]) - _ELEMENT_EMAX
    return xp.maximum(exponent, 0).astype(np.uint8)


def encode_elements(scaled: Any) -> Any:
    """E2M1 codes 0..15 of float32 values already divided by their scale: ties to even, saturating, no negative zero."""
    xp = _namespace(scaled)
    magnitude = xp.abs(scaled)
    # Midpoints between 0, .5, 1, 1.5, 2, 3, 4, 6; a tie goes to the code with an even number.
    code = (
        (magnitude > 0.25).astype(np.uint8)
        + (magnitude >= 0.75)
        + (magnitude > 1.25)
        + (magnitude >= 1.75)
        + (magnitude > 2.5)
        + (magnitude >= 3.5)
        + (magnitude > 5.0)
    )
    sign = ((scaled < 0) & (code > 0)).astype(np.uint8)
    return (code | (sign << 3)).astype(np.uint8)


def quantize(weights: Any, rule: str = "even") -> tuple[Any, Any]:
    """Float32 [..., I] with I % 32 == 0 -> element codes uint8 [..., I] and scale bytes uint8 [..., I/32]."""
    xp = _namespace(weights)
    blocks = weights.astype(np.float32).reshape(*weights.shape[:-1], -1, BLOCK)
    scales = scale_bytes(xp.max(xp.abs(blocks), axis=-1), rule)
    inverse = ((254 - scales.astype(np.int32)) << 23).view(np.float32)  # 2**(127 - byte), exact
    return encode_elements(blocks * inverse[..., None]).reshape(weights.shape), scales


def decode(codes: Any, scales: Any) -> Any:
    """The exact float32 product for every code and scale byte; byte 0xFF gives NaN, an unrepresentable product Inf.

    `codes` uint8 [..., I] (one element each), `scales` uint8 [..., I/32] -> float32 [..., I].
    """
    xp = _namespace(codes)
    byte = xp.repeat(scales.astype(np.int32), BLOCK, axis=-1)
    code = codes.astype(np.int32)
    magnitude = code & 7
    # Twice the element value is an integer: 0, 1, 2, 3, 4, 6, 8, 12.
    doubled = xp.where(magnitude < 4, magnitude, (2 + (magnitude & 1)) << xp.maximum((magnitude >> 1) - 1, 0))
    bits = doubled.astype(np.float32).view(np.int32) + ((byte - 128) << 23)
    field = (doubled.astype(np.float32).view(np.int32) >> 23) + byte - 128
    bits = xp.where(field <= 0, doubled << xp.minimum(byte + 21, 24), bits)  # subnormal: units of 2**-149
    bits = xp.where(field >= 255, _INFINITY_BITS, bits)
    bits = xp.where(doubled == 0, 0, bits)
    bits = xp.where(byte == NAN_SCALE, _NAN_BITS, bits)
    return (bits.astype(np.int32) | ((code & 8) << 28)).view(np.float32)


def pack(codes: Any) -> Any:
    """Element codes uint8 [..., I] -> bytes uint8 [..., I/2]; the even element is the low nibble."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def unpack(packed: Any) -> Any:
    """Bytes uint8 [..., I/2] -> element codes uint8 [..., I]."""
    xp = _namespace(packed)
    return xp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
