"""Random queries and caches, and the op's definition in float64, for the tests of attention over a long cache."""

import jax.numpy as jnp
import numpy as np


def inputs(shape: tuple[int, int, int], lengths: list[int], tokens: int, capacity: int, widths=(48, 32), seed: int = 0):
    """Queries, keys, values, positions and sinks, float32 in numpy, for (batch, key heads, heads of a group).

    `lengths` tokens of each row lie in the cache; the last `tokens` of them are the queries. After them lies NaN.
    """
    rng = np.random.default_rng(seed)
    batch, kv_heads, group = shape
    q_BTHQ = rng.standard_normal((batch, tokens, kv_heads * group, widths[0]), np.float32)
    k_BKSQ, v_BKSV = (rng.standard_normal((batch, kv_heads, capacity, width), np.float32) for width in widths)
    for row, length in enumerate(lengths):
        k_BKSQ[row, :, length:] = v_BKSV[row, :, length:] = np.nan
    query_BT = np.array(lengths, np.int32)[:, None] - tokens + np.arange(tokens, dtype=np.int32)
    return q_BTHQ, k_BKSQ, v_BKSV, query_BT, rng.standard_normal(kv_heads * group).astype(np.float32)


def definition(q_BTHQ, k_BKSQ, v_BKSV, query_BT, sink_H) -> np.ndarray:
    """One query, one head at a time."""
    batch, tokens, heads, width = q_BTHQ.shape
    kv_heads = k_BKSQ.shape[1]
    out = np.zeros((batch, tokens, heads, v_BKSV.shape[3]))
    for row, token, head in np.ndindex(batch, tokens, heads):
        seen = slice(0, int(query_BT[row, token]) + 1)
        kv_head = head // (heads // kv_heads)
        keys, values = (np.asarray(x[row, kv_head, seen], np.float64) for x in (k_BKSQ, v_BKSV))
        logits = keys @ np.asarray(q_BTHQ[row, token, head], np.float64) / np.sqrt(width)
        sink = -np.inf if sink_H is None else float(sink_H[head])
        top = max(logits.max(), sink)
        weights = np.exp(logits - top)
        out[row, token, head] = weights @ values / (weights.sum() + np.exp(sink - top))
    return out


def in_bf16(arrays):
    """On the device, floats in bfloat16; positions stay integers."""
    return [jnp.asarray(x, None if x.dtype == np.int32 else jnp.bfloat16) for x in arrays]


def error(found, expected: np.ndarray) -> float:
    """The largest, for values of scale 1."""
    return float(np.max(np.abs(np.asarray(found, np.float64) - expected)))
