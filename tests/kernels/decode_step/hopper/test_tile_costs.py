"""What products and attention cost as machine code for an H200 that is not there: registers, spills, instructions."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sass
from pallas_kernels.decode_step.hopper import attention, attention_inputs, products
from pallas_kernels.decode_step.hopper.attention import KEYS, Attention
from pallas_kernels.decode_step.hopper.config import CONSUMERS, PAGE_GAP, ROWS, SLOT_WORDS, WARPS, Down, Matrix
from pallas_kernels.decode_step.hopper.plan import MOST_TOKENS
from pallas_kernels.lanes import emitted
from tests.kernels.decode_step.hopper.test_attention import LAYERS, sizes
from tests.kernels.decode_step.hopper.tile_tools import MOST_REGISTERS, OPTIONS, ptx_of
from tests.kernels.triton_tools import needs_compiler

pytestmark = needs_compiler
TWO_NUMBERS = [((2,), jnp.int32)]


def loop_kernel(matrix: Matrix, tokens: int):
    """Chunks as long as a number known at run time says, then an item's rows."""
    tile, rows = products.multiply_chunk(matrix, tokens), products.store_rows(matrix.rows, tokens, 1, False)

    def body(counts, out, ring, page, sums):
        def step(index, _):
            is_first = ((index & 3) == 0).astype(jnp.int32)
            scalars = {"part": index & 1, "first": (index & 3) * (matrix.columns.chunk_cols // 2), "is_first": is_first}
            emitted.call(tile, (ring.at[index & 1], page, sums), scalars)

        lax.fori_loop(0, counts[0], step, None)
        emitted.call(rows, (sums, out), {"item": counts[1], "block": counts[1]})

    def memory(words: int, dtype=jnp.float32, *stack: int):
        return plgpu.SMEM((*stack, words), dtype)

    return kernel_of(
        body,
        jax.ShapeDtypeStruct((tokens, matrix.rows), jnp.float32),
        memory(SLOT_WORDS, jnp.int32, 2),
        memory(2 * tokens * (matrix.columns.part_cols // 2 + PAGE_GAP), jnp.int32),
        memory(3 * WARPS * tokens * ROWS),
    )


def kernel_of(body, out, *scratch):
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        compiler_params=OPTIONS,
    )


@pytest.mark.parametrize(("format", "limit"), [("mxfp4", 2.5), ("fp8", 1.3), ("bf16", 1.1)])
def test_chunks_keep_their_budget(format, limit, tmp_path, monkeypatch):
    """For H200: nothing spilled, registers that four such warpgroups have, instructions per weight that HBM leaves."""
    ptx = ptx_of(loop_kernel(Matrix(48, 1536, format), MOST_TOKENS), TWO_NUMBERS, tmp_path, monkeypatch)
    cost = sass.cost_of(ptx, 1)
    assert cost.spill_bytes == cost.stack_bytes == cost.local_instructions == 0
    assert cost.registers <= MOST_REGISTERS and cost.instructions <= limit, cost


def other_tiles(tokens: int, is_routed: bool):
    """Everything but chunks, in one kernel."""
    pairs, chosen, features = tokens * 8, 8, 256
    ways, format, blocks = (1, "mxfp4", 32) if is_routed else (4, "fp8", None)
    place_of = lambda row, feature: row * (features // 2) + feature // 2  # noqa: E731
    activate = products.store_activated(place_of, tokens, ways, format, blocks)
    down = products.multiply_expert_down(Down(features, 3), chosen, tokens)

    def body(counts, hidden, slot, page, sums, factors, products_, routes, weights_, own):
        tiles, item = {"tiles": counts[1]}, {"item": counts[0], "block": counts[1], "items": counts[1]}
        rows = (sums, hidden, factors)
        emitted.call(activate, (*rows, routes) if is_routed else rows, item)
        emitted.call(
            down,
            (slot, page, products_, routes),
            {"number": counts[0], "units": counts[1], "before": counts[0]} | tiles,
        )
        emitted.call(products.combine(chosen, tokens, 2), (weights_, products_, own), {"team": counts[0]} | tiles)
        emitted.call(products.store_own(48, tokens, ways), (sums, own), {"item": counts[0]})

    words = {
        "slot": (6 * (2 * features + features // 8), jnp.int32),
        "page": (pairs * (features // 2 + PAGE_GAP), jnp.int32),
        "sums": (4 * ways * WARPS * tokens * ROWS, jnp.float32),
        "factors": (tokens, jnp.float32),
        "products": (2 * pairs * products.OWN_COLUMNS, jnp.float32),
        "routes": (pairs * tokens, jnp.int32),
        "weights": (pairs, jnp.float32),
        "own": (tokens * products.OWN_COLUMNS, jnp.float32),
    }
    out = jax.ShapeDtypeStruct((pairs, features // 2), jnp.int32)
    return kernel_of(body, out, *(plgpu.SMEM((count,), dtype) for count, dtype in words.values()))


@pytest.mark.parametrize("is_routed", [False, True])
def test_the_other_tiles_keep_their_registers(is_routed, tmp_path, monkeypatch):
    """For H200: experts' down, the sum over choices and the epilogues are machine code without spills."""
    ptx = ptx_of(other_tiles(MOST_TOKENS, is_routed), TWO_NUMBERS, tmp_path, monkeypatch)
    registers, stack, spilled = sass.assemble(ptx, tmp_path / "kernel.cubin")
    assert stack == spilled == 0 and registers <= MOST_REGISTERS


def layer_kernel(config: Attention, first: int, tiles: int, parts: int):
    """All tiles in the order of a layer, on four warpgroups beside one of role warps, as the decode step has them."""

    def consume(numbers, qkv, table, sinks, cache, buffer, out, queries, keys, values, ring):
        team, cta = lax.axis_index("wg"), lax.axis_index("cta")
        length, count, head = numbers[0], numbers[1], numbers[2]
        teams = config.window is None
        part = cta if teams else team
        place = dict(first=4 * team if teams else 0 - team, tiles=numbers[3])
        held, own = (queries, keys, values), dict(team=team, head=head)
        prepared = dict(first_tile=first, tiles=numbers[3], length=length)
        emitted.call(attention_inputs.prepare(config), (qkv, table, *held), own | prepared)
        written = dict(layer=numbers[4], length=length, count=count)
        emitted.call(attention_inputs.write_cache(config), (*held[1:], cache), own | written)
        start, blocks = attention.blocks_of(config, length, count, part, parts)

        def step(index, state):
            slot, block = ring.at[lax.rem(index, ring.shape[0])], start + index * parts
            scalars = place | dict(block=block, length=length, count=count, first_tile=first)
            return emitted.call(attention.attend_block(config), (*held, slot), scalars, state)

        state = lax.fori_loop(0, blocks, step, emitted.state_of(config.first_state()))
        emitted.call(attention.store_part(config), (buffer,), place | dict(base=part * config.tiles * ROWS), state)
        rows = dict(first_row=0, rows=numbers[5], base=0, step=config.tiles * ROWS, parts=parts, sink=head * 16)
        sinks = (sinks,) if config.has_sink else ()
        emitted.call(attention.merge(config, 16 if teams else 1), (buffer, *sinks, out), own | rows)

    def body(*refs):
        @pl.when(lax.axis_index("wg") < CONSUMERS)
        def _():
            plgpu.set_max_registers(MOST_REGISTERS, action="increase")
            consume(*refs)

        @pl.when(lax.axis_index("wg") == CONSUMERS)
        def _():
            plgpu.set_max_registers(40, action="decrease")

    shapes = {
        "cache": (LAYERS * config.cache_rows // KEYS * config.slot_words, jnp.int32),
        "buffer": (parts * config.tiles * ROWS * config.part_stride, jnp.float32),
        "out": (config.attended.words, jnp.int32),
    }
    words = [(tiles * ROWS * config.key_words,), (config.tokens * config.key_words,)]
    words += [(config.tokens * config.value_words,), (4, SLOT_WORDS)]
    return plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((count,), dtype) for count, dtype in shapes.values()),
        grid=(132,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=[plgpu.SMEM(shape, jnp.int32) for shape in words],
        compiler_params=OPTIONS,
    )


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize("window", [None, 128])
def test_a_layer_keeps_its_registers(window, tokens, tmp_path, monkeypatch):
    """Pro's heads on an H200: the outputs of 16 queries stay in registers from slot to slot, and nothing is spilled.

    Five warpgroups start with 96 registers a thread at most; four of them then have 112.
    """
    config = sizes(tokens, window=window, heads=16, kv_heads=1, head_dim=192, value_dim=128, rotary=64)
    config = dataclasses.replace(config, cache_rows=4096 if window is None else 144)
    kernel = layer_kernel(config, 0, 1 if window else config.tiles, 4 if window else 132)
    arguments = {
        "numbers": ((8,), jnp.int32),
        "qkv": ((tokens * config.qkv_stride,), jnp.float32),
        "table": ((config.positions * config.rotary,), jnp.float32),
        "sinks": ((config.heads,), jnp.float32),
    }
    cost = sass.cost_of(ptx_of(kernel, list(arguments.values()), tmp_path, monkeypatch), 1)
    assert cost.spill_bytes == cost.stack_bytes == cost.local_instructions == 0
    assert cost.registers <= 96, cost
