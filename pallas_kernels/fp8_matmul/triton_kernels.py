"""The two kernels of `triton`, in Triton's own language; this file is read only where Triton is installed."""

import triton
import triton.language as tl


@triton.jit
def _decode(codes, dtype: tl.constexpr):
    """E4M3 -> `dtype`. Not in one step: to bf16 that is an instruction of a sixteenth of the rate on Hopper."""
    return codes.to(tl.float16).to(tl.float32).to(dtype)


@triton.jit
def few(
    x_ptr, codes_ptr, scales_ptr, y_ptr,
    T: tl.constexpr, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a chunk times all tokens; each warp sums every BLOCKS-th block of columns, and adds to the others.

    A product of so few rows and tokens is a chain of dependent instructions; several chains hide each other's latency.
    """
    row_block = tl.program_id(0) * ROWS // BLOCK
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    columns = tl.arange(0, BLOCK)
    blocks = tl.arange(0, BLOCKS)[:, None, None]
    codes_ptr += (chunk * N + rows[None, :, None]) * K + columns[None, None, :]
    scales_ptr += (chunk * tl.cdiv(N, BLOCK) + row_block) * (K // BLOCK)
    x_ptr += tokens[None, None, :] * K + columns[None, :, None]
    is_row = (rows < N)[None, :, None]
    is_token = (tokens < T)[None, None, :]
    y = tl.zeros((BLOCKS, ROWS, TOKENS), tl.float32)
    # One step ahead by hand: Triton pipelines what a product reads, and would wait for these.
    scale = tl.load(scales_ptr + blocks, mask=blocks < K // BLOCK, other=0.0)
    for step in range(tl.cdiv(K // BLOCK, BLOCKS)):
        block = step * BLOCKS + blocks
        is_block = block < K // BLOCK
        codes = tl.load(codes_ptr + block * BLOCK, mask=is_block & is_row, other=0.0)
        x = tl.load(x_ptr + block * BLOCK, mask=is_block & is_token, other=0.0)
        next_scale = tl.load(scales_ptr + block + BLOCKS, mask=block + BLOCKS < K // BLOCK, other=0.0)
        y += scale * tl.dot(_decode(codes, x.dtype), x)
        scale = next_scale
    where = y_ptr + tokens[None, :] * (G * N) + chunk * N + rows[:, None]
    tl.store(where, tl.sum(y, axis=0), mask=(rows < N)[:, None] & (tokens < T)[None, :])


@triton.jit
def many(
    x_ptr, codes_ptr, scales_ptr, y_ptr,
    T: tl.constexpr, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a chunk times TOKENS tokens, block of columns by block."""
    row_block = tl.program_id(1) * ROWS // BLOCK
    chunk = tl.program_id(2)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    codes_ptr += (chunk * N + rows[:, None]) * K + columns[None, :]
    scales_ptr += (chunk * tl.cdiv(N, BLOCK) + row_block) * (K // BLOCK)
    x_ptr += tokens[None, :] * K + columns[:, None]
    is_row = (rows < N)[:, None]
    is_token = (tokens < T)[None, :]
    y = tl.zeros((ROWS, TOKENS), tl.float32)
    scale = tl.load(scales_ptr)
    for block in range(K // BLOCK):
        codes = tl.load(codes_ptr + block * BLOCK, mask=is_row, other=0.0)
        x = tl.load(x_ptr + block * BLOCK, mask=is_token, other=0.0)
        next_scale = tl.load(scales_ptr + block + 1, mask=block + 1 < K // BLOCK, other=0.0)
        y += scale * tl.dot(_decode(codes, x.dtype), x)
        scale = next_scale
    tl.store(y_ptr + tokens[None, :] * (G * N) + chunk * N + rows[:, None], y, mask=is_row & is_token)
