"""The arithmetic of a step in float32 NumPy, token by token.

A number is one sum over a contiguous row, whatever is computed beside it. So a token's bits depend neither on how a
phase is split nor on how many tokens are read together.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

Part = tuple[np.float32, np.float32, np.ndarray]  # of attention: largest score, sum of exponentials, weighted values


def multiply(x_TI: Float[np.ndarray, "T I"], weight_OI: Float[np.ndarray, "O I"]) -> Float[np.ndarray, "T O"]:
    """x W^T, token by token."""
    return np.stack([np.sum(weight_OI * x_I, axis=-1) for x_I in x_TI]).reshape(len(x_TI), -1)


def normalise(x_TD: Float[np.ndarray, "T D"], gain_D: Float[np.ndarray, "D"], eps: float) -> Float[np.ndarray, "T D"]:
    mean_T1 = np.sum(x_TD * x_TD, axis=-1, keepdims=True) / np.float32(x_TD.shape[-1])
    return x_TD / np.sqrt(mean_T1 + np.float32(eps)) * gain_D


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def rotate(x_HQ: np.ndarray, position: int, rotary: int, theta: float) -> np.ndarray:
    """Half-split rotation of the first dimensions."""
    frequencies_R = (theta ** (-np.arange(0, rotary, 2, dtype=np.float64) / rotary)).astype(np.float32)
    angles_R = np.float32(position) * frequencies_R
    cos_R, sin_R, half = np.cos(angles_R), np.sin(angles_R), rotary // 2
    first, second = x_HQ[..., :half], x_HQ[..., half:rotary]
    return np.concatenate([first * cos_R - second * sin_R, second * cos_R + first * sin_R, x_HQ[..., rotary:]], axis=-1)


def attend_part(
    q_Q: Float[np.ndarray, "Q"],
    keys_SQ: Float[np.ndarray, "S Q"],
    values_SV: Float[np.ndarray, "S V"],
    visible_S: Bool[np.ndarray, "S"],
) -> Part:
    """Softmax over some keys, before it is divided by its sum; keys that are not visible add nothing."""
    scores_S = np.sum(keys_SQ * q_Q, axis=-1) * np.float32(q_Q.size**-0.5)
    top = np.max(scores_S, where=visible_S, initial=-np.inf)
    weights_S = np.zeros_like(scores_S)
    weights_S[visible_S] = np.exp(scores_S[visible_S] - top)
    return top, np.sum(weights_S), np.sum(weights_S[:, None] * values_SV, axis=0)


def merge_parts(parts: list[Part], sink: np.float32 | None) -> Float[np.ndarray, "V"]:
    """One query's attention from that to parts of the keys, in their order; the sink joins the denominator."""
    top = max([top for top, _, _ in parts] + ([] if sink is None else [sink]))
    total, out_V = np.float32(0 if sink is None else np.exp(sink - top)), np.zeros_like(parts[0][2])
    for part_top, part_total, part_V in parts:
        scale = np.exp(part_top - top)
        total, out_V = total + part_total * scale, out_V + part_V * scale
    return out_V / total


def swiglu(x_TD: np.ndarray, gate_FD: np.ndarray, up_FD: np.ndarray) -> np.ndarray:
    gate_TF = multiply(x_TD, gate_FD)
    return gate_TF * sigmoid(gate_TF) * multiply(x_TD, up_FD)
