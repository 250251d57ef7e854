"""The Triton kernels as machine code for an H200 that is not there: all of a program's state is in its registers."""

import importlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels import sass, topology
from pallas_kernels.attention import attend_long
from pallas_kernels.attention import shapes as attention
from pallas_kernels.devices import HOPPER, compiling_for
from pallas_kernels.expert_matmul import PackedExperts, expert_ffn
from pallas_kernels.expert_matmul import shapes as experts
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul import shapes as fp8
from pallas_kernels.hardware import GPUS
from tests.kernels.triton_tools import needs_compiler, needs_triton

pytestmark = [*needs_triton, needs_compiler]
Argument = jax.ShapeDtypeStruct


def attention_call(tokens: int) -> tuple:
    shape = attention.PRO_TP8
    q = Argument((1, tokens, shape.heads, shape.key_width), jnp.bfloat16)
    widths = (shape.key_width, shape.value_width)
    rows = [Argument((1, shape.kv_heads, 131_072, width), jnp.bfloat16) for width in widths]
    return attend_long, q, *rows, Argument((1, tokens), jnp.int32), None


def fp8_call(tokens: int) -> tuple:
    shape = fp8.QKV
    codes = Argument((shape.chunks, shape.rows, shape.cols), jnp.float8_e4m3fn)
    scales = Argument((shape.chunks, -(-shape.rows // 128), shape.cols // 128), jnp.float32)
    return fp8_matmul, Argument((tokens, shape.cols), jnp.bfloat16), codes, scales


def experts_call(tokens: int) -> tuple:
    shape = experts.PRO_TP8

    def stack(rows: int, cols: int) -> tuple[Argument, ...]:
        return tuple(Argument((shape.experts, rows, cols // part), jnp.uint8) for part in (2, 32))

    wide = stack(shape.features, shape.hidden)
    ids, weights = (Argument((tokens, shape.chosen), dtype) for dtype in (jnp.int32, jnp.float32))
    x = Argument((tokens, shape.hidden), jnp.bfloat16)
    return expert_ffn, x, ids, weights, PackedExperts(wide, wide, stack(shape.hidden, shape.features))


@pytest.fixture
def written(monkeypatch) -> Iterator[list[str]]:
    """The PTX that Triton writes; jax-triton keeps it to itself."""
    from jax_triton import triton_lib

    found, compile_kernel = [], triton_lib.compile_ttir_to_ptx_inplace

    def compile_and_keep(*arguments, **options):
        result = compile_kernel(*arguments, **options)
        found.append(result.binary)
        return result

    monkeypatch.setattr(triton_lib, "compile_ttir_to_ptx_inplace", compile_and_keep)
    getattr(triton_lib, "_COMPILED_KERNEL_CACHE", {}).clear()  # jax-triton 0.3; 0.4 keeps each by its side
    for folder in ("attention", "expert_matmul", "fp8_matmul"):
        for kernel in vars(importlib.import_module(f"pallas_kernels.{folder}.triton_kernels")).values():
            getattr(kernel, "_jT_kernel_cache", {}).clear()
    yield found


@pytest.mark.parametrize("tokens", [8, 256])
@pytest.mark.parametrize("call", [attention_call, fp8_call, experts_call])
def test_nothing_is_spilled(call, tokens, written, tmp_path):
    """Decoding and prefill at Pro's sizes: no stack and no spill in any kernel."""
    sharding = SingleDeviceSharding(topology.devices(GPUS["h200"], 1)[0])
    op, *arguments = call(tokens)
    placed = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), arguments)
    with compiling_for(HOPPER):
        jax.jit(lambda *inputs: op(*inputs, backend="triton")).lower(*placed)
    assert written
    for text in written:
        (tmp_path / "kernel.ptx").write_text(text)
        _, stack, spilled = sass.assemble(tmp_path / "kernel.ptx", tmp_path / "kernel.cubin")
        assert stack == spilled == 0
