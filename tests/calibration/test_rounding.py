"""Calibrated rounding of one matrix, against GPTQ as its authors derive it and against plain rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.calibration.rounding import SCALE_SHIFTS, damped, round_calibrated
from mimo_jax.weights import MxTensor, dequantize_mx, quantize_mx

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def correlated(inputs: int, columns: int, seed: int) -> np.ndarray:
    """Inputs [N, I] of which a quarter as many directions explain most."""
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((inputs, columns // 4)) @ rng.standard_normal((columns // 4, columns))
    return (few + rng.standard_normal((inputs, columns))).astype(np.float32)


def random_weights(rows: int, columns: int, seed: int) -> np.ndarray:
    return (0.05 * np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)


def error(weights: np.ndarray, rounded: MxTensor, x: np.ndarray) -> float:
    """Squared error of the outputs over their square."""
    return float(np.sum((x @ (np.asarray(dequantize_mx(rounded)) - weights).T) ** 2) / np.sum((x @ weights.T) ** 2))


def nearest(weight: float, scale: float) -> float:
    return float(np.sign(weight) * scale * GRID[np.argmin(np.abs(GRID - abs(weight) / scale))])


def gptq_row(weights: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """One row as in Optimal Brain Quantization: after each weight, the others move by the closed-form optimum, in which
    the inverse of what is left of the moments is taken anew every time. Float64, a loop over everything.
    """
    left, rounded = weights.astype(np.float64), np.zeros(len(weights))
    for first in range(0, len(weights), 32):
        exponent = np.floor(np.log2(np.abs(left[first : first + 32]).max() / 1.75)) + 1 - 2
        attempts = []
        for shift in SCALE_SHIFTS:
            trial, values, loss = left.copy(), [], 0.0
            for column in range(first, first + 32):
                inverse = np.linalg.inv(moments[column:, column:])
                values.append(nearest(trial[column], 2.0 ** (exponent + shift)))
                missed = trial[column] - values[-1]
                loss += missed**2 / inverse[0, 0]
                trial[column:] -= missed / inverse[0, 0] * inverse[0]
            attempts.append((loss, values, trial))
        _, rounded[first : first + 32], left = min(attempts, key=lambda attempt: attempt[0])
    return rounded


def test_it_is_gptq() -> None:
    """Weights and scales are those of the closed form that the method is derived from."""
    weights, x = random_weights(6, 96, 1), correlated(200, 96, 2)
    moments = np.asarray(damped(jnp.asarray(x.T @ x), len(x)))
    found = np.asarray(dequantize_mx(round_calibrated(weights, moments)))
    for row, expected in zip(found, (gptq_row(row, moments.astype(np.float64)) for row in weights)):
        np.testing.assert_array_equal(row, expected)


def test_it_is_plain_rounding_where_inputs_are_independent() -> None:
    """With no second moment off the diagonal and no choice of scales, codes and scales are those of rule `even`."""
    weights = random_weights(64, 128, 3)
    weights[0, :32], weights[1, 32:64], weights[2, 5] = 0, 1e-30, 6.0
    found, plain = round_calibrated(weights, jnp.eye(128), shifts=(0,)), quantize_mx(weights)
    np.testing.assert_array_equal(found.codes, plain.codes)
    np.testing.assert_array_equal(found.scales, plain.scales)


@pytest.mark.parametrize("shape", [(32, 64), (64, 160)])
@pytest.mark.parametrize("seed", range(3))
def test_it_loses_far_less(shape: tuple[int, int], seed: int) -> None:
    """Inputs that go together leave less than half of plain rounding's error, on inputs not learnt from, too."""
    weights, x = random_weights(*shape, seed), correlated(2000, shape[1], seed)
    found = round_calibrated(weights, damped(jnp.asarray(x[:1000].T @ x[:1000]), 1000))
    for part in (x[:1000], x[1000:]):
        assert error(weights, found, part) < 0.5 * error(weights, quantize_mx(weights), part)


def test_scales_are_searched() -> None:
    """Where a smaller scale loses less, it is taken, even though it clips a block's largest weight."""
    weights = np.full((1, 32), 0.75, np.float32)
    weights[0, 0] = 6  # `even` gives scale 1, which has no 0.75; scale 1/2 has it, and 3 for the 6
    moments = np.eye(32, dtype=np.float32)
    moments[0, 0] = 1e-6  # hardly anything reads the largest
    found = round_calibrated(weights, moments)
    assert found.scales[0, 0] == quantize_mx(weights).scales[0, 0] - 1
    np.testing.assert_array_equal(dequantize_mx(found)[0], [3, *[0.75] * 31])


def test_moments_of_nothing_can_be_inverted() -> None:
    """Experts that saw no token, one token, or inputs that are always zero are rounded without NaN; no token at all is
    as if inputs were independent.
    """
    weights = random_weights(16, 64, 4)
    np.testing.assert_array_equal(damped(jnp.zeros((64, 64)), 0), np.eye(64))
    one = correlated(1, 64, 5)
    one[:, :40] = 0
    found = round_calibrated(weights, damped(jnp.asarray(one.T @ one), 1))
    assert error(weights, found, one) <= error(weights, quantize_mx(weights), one)
    assert np.isfinite(np.asarray(dequantize_mx(found))).all()
