"""The two kernels of `triton`, in Triton's own language; this file is read only where Triton is installed."""

import triton
import triton.language as tl


@triton.jit
def _decode(codes, exponents, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Four-bit codes [ROWS, HALF] and E8M0 bytes [ROWS, HALF / 16] -> floats. Exact but for scale byte 0."""
    codes = codes.to(tl.int32)
    magnitude = codes & 7
    doubled = tl.where(magnitude < 4, magnitude, (2 + (magnitude & 1)) << tl.maximum((magnitude >> 1) - 1, 0))
    value = tl.where(codes >= 8, -doubled, doubled).to(tl.float32) * 0.5
    scales = (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    spread = tl.reshape(tl.broadcast_to(scales[:, :, None], (ROWS, HALF // 16, 16)), (ROWS, HALF))
    return value * spread


@triton.jit
def _product(even, odd, codes_ptr, scales_ptr, rows, step, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows of a matrix times tokens, over one step of columns; even columns lie in the low halves of the bytes."""
    HALF: tl.constexpr = COLS // 2
    halves = tl.arange(0, HALF)
    groups = tl.arange(0, COLS // 32)
    codes = tl.load(codes_ptr + rows[:, None] * (width // 2) + step * HALF + halves[None, :])
    scales = tl.load(scales_ptr + rows[:, None] * (width // 32) + step * (COLS // 32) + groups[None, :])
    low = tl.dot(_decode(codes & 15, scales, ROWS, HALF).to(even.dtype), even)
    return tl.dot(_decode(codes >> 4, scales, ROWS, HALF).to(odd.dtype), odd, low)


@triton.jit
def _tokens(x_ptr, token, is_there, step, width, COLS: tl.constexpr):
    """Even and odd columns [COLS / 2, PAIRS] of the tokens' rows."""
    columns = step * COLS + 2 * tl.arange(0, COLS // 2)
    where = x_ptr + token[None, :] * width + columns[:, None]
    return tl.load(where, mask=is_there[None, :], other=0.0), tl.load(where + 1, mask=is_there[None, :], other=0.0)


@triton.jit
def gate_up(
    x_ptr, gate_ptr, gate_scales_ptr, up_ptr, up_scales_ptr, expert_ptr, pair_ptr, hidden_ptr,
    D: tl.constexpr, F: tl.constexpr, X: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """silu(gate x) * (up x) for one group of pairs and ROWS features: [pairs, F], in the dtype of its array."""
    group = tl.program_id(0)
    places = group * PAIRS + tl.arange(0, PAIRS)
    pair = tl.load(pair_ptr + places)
    is_there = pair >= 0
    if tl.max(pair, axis=0) < 0:
        return
    token = tl.where(is_there, pair // X, 0)
    features = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(expert_ptr + group).to(tl.int64) * F + features
    gate = tl.zeros((ROWS, PAIRS), tl.float32)
    up = tl.zeros((ROWS, PAIRS), tl.float32)
    for step in range(D // COLS):
        even, odd = _tokens(x_ptr, token, is_there, step, D, COLS)
        gate += _product(even, odd, gate_ptr, gate_scales_ptr, rows, step, D, ROWS, COLS)
        up += _product(even, odd, up_ptr, up_scales_ptr, rows, step, D, ROWS, COLS)
    hidden = gate * tl.sigmoid(gate) * up
    where = hidden_ptr + pair[None, :] * F + features[:, None]
    tl.store(where, hidden.to(hidden_ptr.dtype.element_ty), mask=is_there[None, :])


@triton.jit
def down(
    hidden_ptr, down_ptr, down_scales_ptr, expert_ptr, pair_ptr, y_ptr,
    D: tl.constexpr, F: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """down h for one group of pairs and ROWS outputs: float32 [pairs, D]."""
    group = tl.program_id(0)
    places = group * PAIRS + tl.arange(0, PAIRS)
    pair = tl.load(pair_ptr + places)
    is_there = pair >= 0
    if tl.max(pair, axis=0) < 0:
        return
    outputs = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(expert_ptr + group).to(tl.int64) * D + outputs
    y = tl.zeros((ROWS, PAIRS), tl.float32)
    for step in range(F // COLS):
        even, odd = _tokens(hidden_ptr, pair, is_there, step, F, COLS)
        y += _product(even, odd, down_ptr, down_scales_ptr, rows, step, F, ROWS, COLS)
    tl.store(y_ptr + pair[None, :] * D + outputs[:, None], y, mask=is_there[None, :])
