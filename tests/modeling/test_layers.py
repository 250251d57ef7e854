"""Numerics conventions: where the published model rounds, this one rounds."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mimo_jax.config.model import SLIDING
from mimo_jax.config.presets import PRESETS
from mimo_jax.layouts.packed import PackedMatrix
from mimo_jax.modeling import attention as attention_module
from mimo_jax.modeling.attention import Attention
from mimo_jax.modeling.layers import RMSNorm, rotary_table, rotate
from mimo_jax.modeling.linear import linear
from mimo_jax.weights import dequantize, quantize_fp8
from tests.tiny import random_params, tiny_config

BF16 = ml_dtypes.bfloat16


def random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rms_norm_casts_before_the_gain():
    """RMSNorm works in float32, rounds to the activation dtype, and only then multiplies by the bf16 gain."""
    x, gain = random((16, 192), 1).astype(BF16), (1 + 0.3 * random((192,), 2)).astype(BF16)
    x32 = x.astype(np.float32)
    normed = x32 / np.sqrt(np.mean(x32 * x32, axis=-1, keepdims=True) + np.float32(1e-5))
    expected = normed.astype(BF16) * gain
    out = RMSNorm(1e-5).apply({"params": {"weight": gain}}, jnp.asarray(x))
    assert out.dtype == jnp.bfloat16
    # rsqrt and the mean may differ in the last float32 bit, which moves a bf16 rounding in one element of thousands.
    assert np.mean(np.asarray(out) != expected) < 1e-3
    one_rounding = (normed * gain.astype(np.float32)).astype(BF16)
    assert np.mean(one_rounding != expected) > 0.05, "the two conventions must be distinguishable here"


def test_value_scale_is_applied_in_float32(monkeypatch):
    """Values are scaled by 0.612 in float32 and rounded once; in bf16 the constant itself would be 0.2 % off."""
    config = tiny_config(dtype="bfloat16", mtp_layers=0)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(config)["layers_1"]["attention"])
    seen = {}

    def capture(q, k, v, visible, sink):
        seen["v"] = jnp.swapaxes(v, 1, 2)  # as projected: tokens before heads
        return jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)

    monkeypatch.setattr(attention_module, "attend", capture)
    x = jnp.asarray(random((1, 4, config.hidden_size)), jnp.bfloat16)
    rotary = rotary_table(jnp.arange(4)[None], config.rotary_dim, 1e4, jnp.bfloat16)
    Attention(config, SLIDING).apply({"params": params}, x, rotary)
    rows = (config.num_heads + config.kv_heads(SLIDING)) // config.qkv_chunks * config.head_dim
    v = jnp.einsum("btd,gmd->btgm", x, params["qkv"][:, rows:], preferred_element_type=jnp.float32).astype(BF16)
    v = np.asarray(v).reshape(seen["v"].shape)
    np.testing.assert_array_equal(np.asarray(seen["v"]), (v.astype(np.float32) * np.float32(0.612)).astype(BF16))
    assert np.mean(np.asarray(seen["v"]) != v * BF16(0.612)) > 0.1


def test_rotary_width_is_truncated():
    """int(192 * 0.334) is 64: rounding or a plain third would rotate another number of dimensions."""
    for name in ("mimo-v2.5-pro", "mimo-v2.5", "mimo-v2-flash"):
        assert PRESETS[name].rotary_dim == 64


def test_rotation_leaves_the_rest_alone_and_is_relative():
    """Only the first 2R dimensions turn, and a score depends on the distance between positions alone."""
    x, y = jnp.asarray(random((1, 1, 2, 24), 1)), jnp.asarray(random((1, 1, 2, 24), 2))

    def at(value, position):
        return rotate(value, *rotary_table(jnp.array([[position]]), 8, 1e4, jnp.float32))

    np.testing.assert_array_equal(at(x, 37)[..., 8:], x[..., 8:])
    np.testing.assert_allclose(at(x, 0), x, atol=1e-7)
    near = jnp.sum(at(x, 9) * at(y, 4), axis=-1)
    far = jnp.sum(at(x, 1009) * at(y, 1004), axis=-1)
    np.testing.assert_allclose(near, far, atol=2e-3)  # angles near 1000 carry 6e-5 of float32 rounding each
    # The half-split pairs dimension i with i + R, as NeoX does, not with its neighbour.
    unit = jnp.zeros((1, 1, 1, 24)).at[..., 0].set(1.0)
    np.testing.assert_allclose(at(unit, 1)[0, 0, 0, :8], [np.cos(1), 0, 0, 0, np.sin(1), 0, 0, 0], atol=1e-6)


def test_rotary_angles_are_exact_at_long_context():
    """At position one million angles are still those of float32 frequencies: no drift from repeated products."""
    position = 1_000_000
    cos, sin = rotary_table(jnp.array([[position]]), 64, 1e7, jnp.float32)
    frequency = (1e7 ** (-np.arange(0, 64, 2) / 64)).astype(np.float32)
    angle = (np.float32(position) * frequency).astype(np.float64)
    # One float32 product per angle; cos and sin of large arguments are good to a few ulp of 1.
    np.testing.assert_allclose(cos[0, 0], np.cos(angle), atol=2e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(angle), atol=2e-6)


def test_linear_multiplies_by_every_container():
    """A linear layer gives the same numbers from an FP8 matrix as from the plain one."""
    x, weight = jnp.asarray(random((3, 128), 1)), random((64, 128), 2)
    fp8 = quantize_fp8(weight)
    found = linear(x, PackedMatrix(fp8, ()))
    np.testing.assert_allclose(found, linear(x, dequantize(fp8)), atol=2e-5, rtol=0)  # scales multiply sums
    assert linear(x.astype(jnp.bfloat16), jnp.asarray(weight)).dtype == jnp.bfloat16


def test_linear_keeps_the_axes_of_chunks():
    """A fused projection [J, O, I] gives [..., J, O]: each chunk's own rows."""
    x, weight = jnp.asarray(random((2, 5, 128), 1)), random((4, 24, 128), 2)
    expected = np.einsum("bti,joi->btjo", x, weight)
    np.testing.assert_allclose(linear(x, jnp.asarray(weight)), expected, rtol=1e-5, atol=1e-4)
