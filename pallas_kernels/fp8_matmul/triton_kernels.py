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
    T: tl.constexpr, J: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a chunk times all tokens; each warp takes every BLOCKS-th block of columns, and their sums add up.

    A product of so few rows and tokens is a chain of dependent instructions; several chains hide each other's latency.
    """
    row_block = tl.program_id(0) * ROWS // BLOCK
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    columns = tl.arange(0, BLOCKS * BLOCK)[None, :]
    blocks = tl.arange(0, BLOCKS)[:, None, None]
    is_row = (rows < OUT)[:, None]
    is_token = (tokens < T)[:, None]
    codes_ptr += (chunk * OUT + rows[:, None]) * IN + columns
    scales_ptr += (chunk * tl.cdiv(OUT, BLOCK) + row_block) * (IN // BLOCK) + blocks
    x_ptr += tokens[:, None] * IN + columns
    y = tl.zeros((BLOCKS, ROWS, TOKENS), tl.float32)
    # One step ahead by hand: Triton pipelines what a product reads, and would wait for these.
    scale = tl.load(scales_ptr, mask=blocks < IN // BLOCK, other=0.0)
    for start in range(0, IN // BLOCK, BLOCKS):
        is_column = start * BLOCK + columns < IN
        # As rows of memory, and split into blocks afterwards: loaded as blocks, they would lie in few banks.
        codes = tl.load(codes_ptr + start * BLOCK, mask=is_column & is_row, other=0.0)
        x = tl.load(x_ptr + start * BLOCK, mask=is_column & is_token, other=0.0)
        left = tl.permute(tl.reshape(_decode(codes, x.dtype), (ROWS, BLOCKS, BLOCK)), (1, 0, 2))
        right = tl.permute(tl.reshape(x, (TOKENS, BLOCKS, BLOCK)), (1, 2, 0))
        ahead = start + BLOCKS
        next_scale = tl.load(scales_ptr + ahead, mask=ahead + blocks < IN // BLOCK, other=0.0)
        y += scale * tl.dot(left, right)
        scale = next_scale
    where = y_ptr + tokens[None, :] * (J * OUT) + chunk * OUT + rows[:, None]
    tl.store(where, tl.sum(y, axis=0), mask=(rows < OUT)[:, None] & (tokens < T)[None, :])


@triton.jit
def many(
    x_ptr, codes_ptr, scales_ptr, y_ptr,
    T: tl.constexpr, J: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a chunk times TOKENS tokens, block of columns by block."""
    row_block = tl.program_id(1) * ROWS // BLOCK
    chunk = tl.program_id(2)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    codes_ptr += (chunk * OUT + rows[:, None]) * IN + columns[None, :]
    scales_ptr += (chunk * tl.cdiv(OUT, BLOCK) + row_block) * (IN // BLOCK)
    x_ptr += tokens[None, :] * IN + columns[:, None]
    is_row = (rows < OUT)[:, None]
    is_token = (tokens < T)[None, :]
    y = tl.zeros((ROWS, TOKENS), tl.float32)
    scale = tl.load(scales_ptr)
    for block in range(IN // BLOCK):
        codes = tl.load(codes_ptr + block * BLOCK, mask=is_row, other=0.0)
        x = tl.load(x_ptr + block * BLOCK, mask=is_token, other=0.0)
        next_scale = tl.load(scales_ptr + block + 1, mask=block + 1 < IN // BLOCK, other=0.0)
        y += scale * tl.dot(_decode(codes, x.dtype), x)
        scale = next_scale
    tl.store(y_ptr + tokens[None, :] * (J * OUT) + chunk * OUT + rows[:, None], y, mask=is_row & is_token)
