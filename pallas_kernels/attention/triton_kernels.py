"""The two kernels of `triton`, in Triton's own language; this file is read only where Triton is installed."""

import triton
import triton.language as tl

# A power of two, so that its product with the scale is exact, and what is fused equals what is rounded.
MASKED = tl.constexpr(-(2.0**100))


@triton.jit
def _visit(
    block, q_low, q_high, k_ptr, v_ptr, position, readable, top, total, out,
    Q: tl.constexpr, V: tl.constexpr, LOW: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and weighted values after one block of keys, all of it visible to all rows if WHOLE."""
    keys = tl.arange(0, KEYS)
    k_where = k_ptr + block * KEYS * Q + keys[:, None] * Q
    v_where = v_ptr + block * KEYS * V + keys[:, None] * V + tl.arange(0, V)[None, :]
    low_where = k_where + tl.arange(0, LOW)[None, :]
    high_where = k_where + LOW + tl.arange(0, Q - LOW)[None, :]
    is_there = (block * KEYS + keys < readable)[:, None]
    if WHOLE:
        k_low, k_high = tl.load(low_where), tl.load(high_where)
    else:
        k_low, k_high = tl.load(low_where, mask=is_there, other=0.0), tl.load(high_where, mask=is_there, other=0.0)
    scores = tl.dot(q_high, tl.trans(k_high), tl.dot(q_low, tl.trans(k_low)))
    if WHOLE:
        values = tl.load(v_where)
    else:
        values = tl.load(v_where, mask=is_there, other=0.0)
        scores = tl.where((block * KEYS + keys)[None, :] <= position[:, None], scores, MASKED)
    higher = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(tl.fma(scores, SCALE, -(higher * SCALE)[:, None]))
    kept = tl.exp2((top - higher) * SCALE)
    total = total * kept + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(values.dtype), values, out * kept[:, None])
    return higher, total, out


@triton.jit
def attend_split(
    q_ptr, k_ptr, v_ptr, position_ptr, out_ptr, top_ptr, total_ptr,
    T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, V: tl.constexpr,
    LOW: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """ROWS (token, head of the group) pairs over every SPLITS-th block of KEYS keys.

    Writes their weighted values, and the maximum (in base 2) and the sum that these are relative to; where there is
    no block to read, a maximum alone, so low that `merge` reads nothing else.
    """
    tiles: tl.constexpr = (T * G + ROWS - 1) // ROWS
    head = tl.program_id(0) // tiles  # of all rows of the batch
    split = tl.program_id(1)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    is_row = rows < T * G
    token = head // K * T + rows // G
    position = tl.load(position_ptr + token, mask=is_row, other=-1)
    where = (split * (tl.num_programs(0) // tiles) + head) * (T * G) + rows
    readable = tl.minimum(tl.max(position, axis=0) + 1, S)
    blocks = tl.cdiv(readable, KEYS)
    if split >= blocks:
        tl.store(top_ptr + where, tl.full((ROWS,), MASKED * SCALE, tl.float32), mask=is_row)
        return
    q_where = q_ptr + (token * (K * G) + head % K * G + rows % G)[:, None] * Q
    q_low = tl.load(q_where + tl.arange(0, LOW)[None, :], mask=is_row[:, None], other=0.0)
    q_high = tl.load(q_where + LOW + tl.arange(0, Q - LOW)[None, :], mask=is_row[:, None], other=0.0)
    k_ptr += head.to(tl.int64) * S * Q
    v_ptr += head.to(tl.int64) * S * V

    seen_by_all = tl.minimum(tl.min(tl.where(is_row, position, S), axis=0) + 1, S) // KEYS
    top = tl.full((ROWS,), MASKED, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, V), tl.float32)
    for block in range(split, seen_by_all, SPLITS):
        top, total, out = _visit(
            block, q_low, q_high, k_ptr, v_ptr, position, readable, top, total, out, Q, V, LOW, KEYS, SCALE, True
        )
    rest = split + tl.maximum(tl.cdiv(seen_by_all - split, SPLITS), 0) * SPLITS
    for block in range(rest, blocks, SPLITS):
        top, total, out = _visit(
            block, q_low, q_high, k_ptr, v_ptr, position, readable, top, total, out, Q, V, LOW, KEYS, SCALE, False
        )
    tl.store(out_ptr + where[:, None] * V + tl.arange(0, V)[None, :], out, mask=is_row[:, None])
    tl.store(top_ptr + where, top * SCALE, mask=is_row)
    tl.store(total_ptr + where, total, mask=is_row)


@triton.jit
def merge(
    out_ptr, top_ptr, total_ptr, sink_ptr, result_ptr,
    T: tl.constexpr, K: tl.constexpr, G: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The splits of one row of [B, K, T, G], brought to one maximum: a row of [B, T, K, G], in the result's dtype."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    head = row // (T * G) % K * G + row % G
    columns = tl.arange(0, V)
    sink = tl.load(sink_ptr + head)
    top = sink
    for first in range(0, SPLITS, AT_ONCE):
        splits = first + tl.arange(0, AT_ONCE)
        tops = tl.load(top_ptr + splits * rows + row, mask=splits < SPLITS, other=float("-inf"))
        top = tl.maximum(top, tl.max(tops, axis=0))
    total = tl.exp2(sink - top)
    out = tl.zeros((V,), tl.float32)
    for first in range(0, SPLITS, AT_ONCE):
        splits = first + tl.arange(0, AT_ONCE)
        tops = tl.load(top_ptr + splits * rows + row, mask=splits < SPLITS, other=float("-inf"))
        weights = tl.exp2(tops - top)
        where = splits * rows + row
        total += tl.sum(tl.load(total_ptr + where, mask=weights > 0, other=0.0) * weights, axis=0)
        outs = tl.load(out_ptr + where[:, None] * V + columns[None, :], mask=(weights > 0)[:, None], other=0.0)
        out += tl.sum(outs * weights[:, None], axis=0)
    token = row // (K * T * G) * T + row // G % T
    where = (token * (K * G) + head) * V + columns
    tl.store(result_ptr + where, (out / total).to(result_ptr.dtype.element_ty))
