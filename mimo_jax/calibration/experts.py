"""Rounds a layer's experts one after the other, each to what its own tokens need, so that the moments of one are held.

The projection down comes last and sees what is already lost: it reads the hidden values of the rounded gate and up, and
is first refitted, by least squares, to what is missing in the layer's output after the experts before.

A token's error counts in units of the residual stream that the output is added to: all that reads the stream divides by
that. Else the first token of a text would decide, whose output is nine tenths of all in some layers of some models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mimo_jax.calibration.rounding import damped, round_calibrated
from mimo_jax.weights import MxTensor, StoredWeight, dequantize, dequantize_mx, quantize_mx

_ROWS = 1024  # tokens that an expert reads at once

Matrices = Sequence[Float[Array, "_ _"]]  # gate [F, D], up [F, D], down [D, F]


@dataclasses.dataclass(frozen=True)
class Routed:
    """What a layer's experts read and where their outputs go, what its router gives them, and which tokens are held
    out: those are measured, never learnt from.
    """

    stream_TD: Float[np.ndarray, "T D"]  # before their outputs are added
    x_TD: Float[np.ndarray, "T D"]
    ids_TX: Int[np.ndarray, "T X"]
    weights_TX: Float[np.ndarray, "T X"]
    heldout_T: Bool[np.ndarray, "T"]

    def pieces_of(self, expert: int) -> list[_Piece]:
        """The tokens that chose an expert."""
        weights_T = np.sum(self.weights_TX, axis=-1, where=self.ids_TX == expert)
        chosen = np.flatnonzero((self.ids_TX == expert).any(axis=-1))
        return [self._piece(chosen[first : first + _ROWS], weights_T) for first in range(0, len(chosen), _ROWS)]

    def _piece(self, tokens: np.ndarray, weights_T: np.ndarray) -> _Piece:
        padding = (0, _ROWS - len(tokens))
        return _Piece(tokens, np.pad(self.x_TD[tokens], (padding, (0, 0))), np.pad(weights_T[tokens], padding))

    def importance(self, outputs_TD: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T"]:
        """How much an error of each token counts, given the experts' exact outputs; 0 for what is held out."""
        size_T = np.sqrt(np.mean((self.stream_TD + outputs_TD) ** 2, axis=-1))
        return np.where(self.heldout_T, 0, 1 / np.maximum(size_T, np.finfo(np.float32).tiny)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Some tokens of one expert, their number a constant (compiled once): those that fill it up have weight 0."""

    tokens: np.ndarray  # their places in the text
    x_RD: np.ndarray
    weights_R: np.ndarray  # that multiply the expert's output

    def of(self, values_T: np.ndarray) -> np.ndarray:
        """Its rows of an array of all tokens, 0 where it is filled up."""
        padding = [(0, _ROWS - len(self.tokens))] + [(0, 0)] * (values_T.ndim - 1)
        return np.pad(values_T[self.tokens], padding)

    def add_output(self, total_TD: np.ndarray, matrices: Matrices, sign: int = 1) -> None:
        """Adds the expert's outputs to those of the layer."""
        outputs_RD = _output(self.x_RD, self.weights_R, matrices)
        total_TD[self.tokens] += sign * np.asarray(outputs_RD)[: len(self.tokens)]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Sums over experts for every token: before rounding, after plain rounding and after calibrated rounding."""

    exact_TD: Float[np.ndarray, "T D"]
    plain_TD: Float[np.ndarray, "T D"]
    calibrated_TD: Float[np.ndarray, "T D"]

    def errors(self, chosen_T: Bool[np.ndarray, "T"]) -> tuple[float, float]:
        """Squared error over squared output, of plain and of calibrated rounding."""
        exact = self.exact_TD[chosen_T].astype(np.float64)
        plain, calibrated = (
            np.sum((found[chosen_T] - exact) ** 2) / (np.sum(exact**2) or 1.0)
            for found in (self.plain_TD, self.calibrated_TD)
        )
        return float(plain), float(calibrated)


def round_experts(
    stacks: Sequence[StoredWeight], routed: Routed, advance: Callable[[], None]
) -> tuple[list[MxTensor], Outputs, int]:
    """The stacks gate, up and down in MXFP4; all outputs; and of how many tokens the expert with the fewest learnt."""
    exact_TD, plain_TD, lost_TD = (np.zeros_like(routed.x_TD) for _ in range(3))
    for expert in range(stacks[0].shape[0]):
        exact = _exact(stacks, expert)
        for piece in routed.pieces_of(expert):
            piece.add_output(exact_TD, exact)
    importance_T = routed.importance(exact_TD)
    experts, fewest = [], len(routed.x_TD)
    for expert in range(stacks[0].shape[0]):
        exact, pieces = _exact(stacks, expert), routed.pieces_of(expert)
        tokens = sum(int(np.count_nonzero(importance_T[piece.tokens])) for piece in pieces)
        calibrated = _round_expert(exact, pieces, tokens, importance_T, lost_TD)
        plain, kept = ([_expanded(matrix) for matrix in rounded] for rounded in (map(quantize_mx, exact), calibrated))
        for piece in pieces:
            piece.add_output(plain_TD, plain)
            piece.add_output(lost_TD, exact)
            piece.add_output(lost_TD, kept, -1)
        experts.append([jax.tree.map(np.asarray, matrix) for matrix in calibrated])
        fewest = min(fewest, tokens)
        advance()
    rounded = [jax.tree.map(lambda *parts: np.stack(parts), *stack) for stack in zip(*experts)]
    return rounded, Outputs(exact_TD, plain_TD, exact_TD - lost_TD), fewest


def _exact(stacks: Sequence[StoredWeight], expert: int) -> Matrices:
    return [jnp.asarray(dequantize(stack[expert], np.float32)) for stack in stacks]


def _round_expert(
    exact: Matrices, pieces: list[_Piece], tokens: int, importance_T: np.ndarray, lost_TD: np.ndarray
) -> list[MxTensor]:
    """Gate, up and down, where `lost_TD` of the layer's outputs has been lost by the experts before."""
    gate_FD, up_FD, down_DF = exact
    features, width = gate_FD.shape
    moments_DD = jnp.zeros((width, width))
    for piece in pieces:
        moments_DD += _moments(piece.x_RD, piece.weights_R * piece.of(importance_T))
    wide = round_calibrated(jnp.concatenate([gate_FD, up_FD]), damped(moments_DD, tokens))
    gate, up = wide[:features], wide[features:]

    rounded = _expanded(gate), _expanded(up)
    moments_FF, missing_DF = jnp.zeros((features, features)), jnp.zeros((width, features))
    for piece in pieces:
        given = (piece.x_RD, piece.weights_R, piece.of(importance_T), piece.of(lost_TD))
        found = _moments_down(*given, exact, rounded)
        moments_FF, missing_DF = moments_FF + found[0], missing_DF + found[1]
    moments_FF = damped(moments_FF, tokens)
    refitted_DF = down_DF + jax.scipy.linalg.solve(moments_FF, missing_DF.T, assume_a="pos").T
    return [gate, up, round_calibrated(refitted_DF, moments_FF)]


_expanded = jax.jit(dequantize_mx)


@jax.jit
def _moments(x_RI: Float[Array, "R I"], weights_R: Float[Array, "R"]) -> Float[Array, "I I"]:
    weighted_RI = x_RI * weights_R[:, None]
    return weighted_RI.T @ weighted_RI


def _hidden(x_RD: Array, gate_FD: Array, up_FD: Array) -> Array:
    return jax.nn.silu(x_RD @ gate_FD.T) * (x_RD @ up_FD.T)


@jax.jit
def _moments_down(
    x_RD: Array, weights_R: Array, importance_R: Array, lost_RD: Array, exact: Matrices, rounded: Matrices
) -> tuple[Float[Array, "F F"], Float[Array, "D F"]]:
    """Second moments of the hidden values after rounded gate and up; and with them, those of the outputs that are lost
    before this expert (`lost_RD`) and by its own gate and up.
    """
    gate_FD, up_FD, down_DF = exact
    hidden_RF = _hidden(x_RD, *rounded) * weights_R[:, None]
    change_RF = _hidden(x_RD, gate_FD, up_FD) * weights_R[:, None] - hidden_RF
    missing_RD = (lost_RD + change_RF @ down_DF.T) * importance_R[:, None]
    hidden_RF *= importance_R[:, None]
    return hidden_RF.T @ hidden_RF, missing_RD.T @ hidden_RF


@jax.jit
def _output(x_RD: Array, weights_R: Array, matrices: Matrices) -> Array:
    gate_FD, up_FD, down_DF = matrices
    return (_hidden(x_RD, gate_FD, up_FD) * weights_R[:, None]) @ down_DF.T
