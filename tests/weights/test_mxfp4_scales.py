"""Scale bytes: three named rules, each exact, none computed with logarithms."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.errors import UserError
from mimo_jax.weights.mxfp4 import check_finite, check_scales
from pallas_kernels import mxfp4

# Block maximum -> byte under (floor, even, ceil6): where the rules part, and just beside it.
DECISIONS = {
    6.0: (0x7F, 0x7F, 0x7F),
    np.nextafter(np.float32(6), np.float32(7)): (0x7F, 0x7F, 0x80),
    6.25: (0x7F, 0x7F, 0x80),
    np.nextafter(np.float32(7), np.float32(0)): (0x7F, 0x7F, 0x80),
    7.0: (0x7F, 0x80, 0x80),
    7.9999995: (0x7F, 0x80, 0x80),  # float32 log2 rounds this one up: ggml and gguf write 0x80 under floor
    8.0: (0x80, 0x80, 0x80),
}


@pytest.mark.parametrize("rule_index, rule", list(enumerate(("floor", "even", "ceil6"))))
@pytest.mark.parametrize("backend", [np, jnp], ids=["numpy", "jax"])
def test_each_rule_decides_as_documented(backend, rule_index, rule):
    """The scale of a block is the one its rule's name promises, on the host and under XLA alike."""
    maxima = backend.asarray(np.array(list(DECISIONS), np.float32))
    expected = [row[rule_index] for row in DECISIONS.values()]
    assert mxfp4.scale_bytes(maxima, rule).tolist() == expected


@pytest.mark.parametrize("rule", mxfp4.SCALE_RULES)
def test_rules_hold_at_every_exponent(rule):
    """A rule does not drift at small or large magnitudes: doubling a maximum raises its byte by exactly one."""
    mantissas = np.array([1, 1.25, 1.5, np.nextafter(np.float32(1.5), np.float32(2)), 1.75, 1.9999999], np.float32)
    exponents = np.arange(-123, 127)
    bytes_ = mxfp4.scale_bytes(np.ldexp(mantissas[None], exponents[:, None]).astype(np.float32), rule).astype(int)
    np.testing.assert_array_equal(np.diff(bytes_, axis=0), 1)


def test_zero_and_largest_blocks():
    """An all-zero block is byte 0 with codes 0; the largest finite float32 still gets a finite scale."""
    codes, scales = mxfp4.quantize(np.zeros((1, 32), np.float32))
    assert scales.tolist() == [[0]] and not codes.any()
    for rule in mxfp4.SCALE_RULES:
        _, scales = mxfp4.quantize(np.full((1, 32), np.finfo(np.float32).max), rule)
        assert scales[0, 0] in (252, 253)


def test_unknown_rule_is_named():
    """A misspelt rule says which rules exist."""
    with pytest.raises(ValueError, match="'evn' is unknown; known: even, floor, ceil6"):
        mxfp4.scale_bytes(np.ones(1, np.float32), "evn")


def test_no_logarithms_in_the_codec():
    """Scales come from exponent bits: no log2, exp2, pow or ** with a variable exponent in the codec's source."""
    tree = ast.parse(Path(mxfp4.__file__).read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not used & {"log", "log2", "log10", "exp", "exp2", "pow", "power", "ldexp", "frexp"}
    powers = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)]
    assert not powers


def test_numbers_without_a_code_are_refused():
    """NaN, Inf and scale byte 0xFF end in an error that names the tensor and the index."""
    weights = np.zeros((4, 64), np.float32)
    check_finite(weights, "w")
    for bad, shown in ((np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")):
        weights[2, 5] = bad
        with pytest.raises(UserError, match=rf"layers\.1\.gate: {shown} at index \[2, 5\]"):
            check_finite(weights, "layers.1.gate")
    scales = np.full((4, 2), 254, np.uint8)
    check_scales(scales, "s")
    scales[3, 1] = 0xFF
    with pytest.raises(UserError, match=r"layers\.1\.gate_scale: scale byte 0xFF \(NaN\) at index \[3, 1\]"):
        check_scales(scales, "layers.1.gate_scale")


@pytest.mark.parametrize("rule", mxfp4.SCALE_RULES)
def test_jit_and_host_agree(rule):
    """The host quantiser and the jitted one write the same bytes for every normal block."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((64, 128)) * np.exp(rng.uniform(-20, 20, (64, 1)))).astype(np.float32)
    host = mxfp4.quantize(weights, rule)
    device = jax.jit(mxfp4.quantize, static_argnums=1)(jnp.asarray(weights), rule)
    np.testing.assert_array_equal(host[0], device[0])
    np.testing.assert_array_equal(host[1], device[1])
