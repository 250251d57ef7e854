"""Element codes, packing and exact loop."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import mxfp4

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
CODE_GRID = np.tile(np.arange(32, dtype=np.uint8) % 16, (256, 1))
BYTE_GRID = np.arange(256, dtype=np.uint8)[:, None]


def exact_products() -> np.ndarray:
    """Every (scale byte, code) product, formed in float64, where it is exact, then rounded to float32."""
    with np.errstate(over="ignore"):
        exact = (VALUES[CODE_GRID] * np.ldexp(1.0, BYTE_GRID.astype(int) - 127)).astype(np.float32)
    exact[255] = np.nan
    return exact


def test_every_scale_and_code_decodes_exactly():
    """All 256 scale bytes times 16 codes give the exact product: subnormals kept, overflow Inf, 0xFF NaN."""
    decoded = mxfp4.decode(CODE_GRID, BYTE_GRID)
    np.testing.assert_array_equal(decoded, exact_products())
    np.testing.assert_array_equal(np.signbit(decoded[:255]), np.signbit(exact_products()[:255]))
    assert np.isnan(decoded[255]).all()
    assert np.isinf(decoded[254, 7]) and np.isfinite(decoded[252]).all()


def test_every_scale_and_code_decodes_exactly_under_jit():
    """XLA decodes all normal products exactly; only below 2**-126 (bytes 0 and 1) may it flush to zero."""
    decoded = np.asarray(jax.jit(mxfp4.decode)(jnp.asarray(CODE_GRID), jnp.asarray(BYTE_GRID)))
    exact = exact_products()
    np.testing.assert_array_equal(decoded[2:], exact[2:])
    tiny = np.finfo(np.float32).tiny
    for row in (0, 1):
        flushed = np.where(np.abs(exact[row]) < tiny, 0, exact[row])
        assert np.all((decoded[row] == exact[row]) | (decoded[row] == flushed))


def test_even_element_is_the_low_nibble():
    """Byte order is the published one, the same as XLA's own float4_e2m1fn layout."""
    assert mxfp4.pack(np.array([[3, 5]], np.uint8)).tolist() == [[0x53]]
    every_byte = np.arange(256, dtype=np.uint8)[None]
    codes = mxfp4.unpack(every_byte)
    assert codes[0, : 2 * 0x54].tolist()[-4:] == [2, 5, 3, 5]
    np.testing.assert_array_equal(mxfp4.pack(codes), every_byte)
    as_float4 = jax.lax.bitcast_convert_type(jnp.asarray(every_byte), jnp.float4_e2m1fn).astype(jnp.float32)
    np.testing.assert_array_equal(as_float4.reshape(1, -1), VALUES[codes])
    np.testing.assert_array_equal(jax.jit(mxfp4.unpack)(every_byte), codes)


def test_ties_go_to_even():
    """Halfway values round to the even code, and anything above 6 saturates."""
    scaled = np.array([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6.5, 7.99], np.float32)
    assert mxfp4.encode_elements(scaled).tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 7, 7]
    assert mxfp4.encode_elements(-scaled).tolist() == [15, 0, 10, 10, 12, 12, 14, 14, 15, 15]
    assert mxfp4.encode_elements(np.array([-0.0, -0.2], np.float32)).tolist() == [0, 0]  # no negative zero


def test_published_vector_with_every_tie():
    """The block of ties that tells libraries apart gives Quark's bytes: torchao's, with every zero positive."""
    ties = np.array([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    above, below = np.nextafter(ties[1:], np.float32(9)), np.nextafter(ties[1:], np.float32(0))
    block = np.concatenate([ties, -ties, above, below, [0.0, -0.0]]).astype(np.float32)
    for rule in mxfp4.SCALE_RULES:
        codes, scales = mxfp4.quantize(block[None], rule)
        assert scales.tolist() == [[0x7F]]
        assert mxfp4.pack(codes).tobytes().hex() == "072244660faaccee2143650721436500"


def test_published_vector_of_an_ordinary_block():
    """A block of ordinary bf16 weights gives the bytes that every library agrees on."""
    words = (
        "3bb1 3b84 bc1b 3c2a 3b31 b9a7 3c1e bca5 baa5 bc5d bc39 bca1 bcf1 3c97 bca3 bd1b "
        "3c63 bc43 bc31 bcab bb88 3c32 bbd4 3c1a bd22 bc87 3c9f bc24 bd01 3c69 39fb 3c37"
    )
    block = (np.array([int(word, 16) for word in words.split()], np.uint32) << 16).view(np.float32)
    codes, scales = mxfp4.quantize(block[None])
    assert scales.tolist() == [[0x78]]
    # One element rounds to -0 in the published bytes (nibble 8); here every zero is +0.
    published = mxfp4.unpack(np.frombuffer(bytes.fromhex("113a81d2b8db4eedb4db392acfb44e30"), np.uint8)[None])
    np.testing.assert_array_equal(codes, np.where(published == 8, 0, published))


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None)
@given(weights=hnp.arrays(np.float32, (2, 32), elements=FINITE), rule=st.sampled_from(mxfp4.SCALE_RULES))
def test_quantizing_twice_changes_nothing(weights, rule):
    """Values that MXFP4 can hold survive another quantisation exactly, whatever the rule."""
    once = mxfp4.decode(*mxfp4.quantize(weights, rule))
    codes, scales = mxfp4.quantize(once, rule)
    np.testing.assert_array_equal(mxfp4.decode(codes, scales), once)
    assert (scales != mxfp4.NAN_SCALE).all()


@settings(max_examples=150, deadline=None)
@given(weights=hnp.arrays(np.float32, (1, 32), elements=FINITE))
def test_rounding_is_to_the_nearest_value(weights):
    """No element is further from its code than half the gap around it; only a saturated maximum may be."""
    codes, scales = mxfp4.quantize(weights)
    scale = np.ldexp(1.0, scales.astype(int) - 127)
    scaled = np.clip(weights.astype(np.float64) / scale, -6, 6)
    nearest = np.min(np.abs(scaled[..., None] - VALUES), axis=-1)
    np.testing.assert_array_equal(np.abs(scaled - VALUES[codes]), nearest)
