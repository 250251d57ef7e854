"""Tiles of matrix products against float64, by emulation."""

import functools
import operator
import re

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import mxfp4
from pallas_kernels.decode_step.hopper import products, weights
from pallas_kernels.decode_step.hopper.config import INPUT_SHIFT, PAGE_GAP, ROWS, SUM_STRIDE, Down, Matrix
from pallas_kernels.lanes import emulated

FORMATS = ("mxfp4", "fp8", "bf16")
GARBAGE = np.float32("nan")


def random_weights(format: str, rows: int, cols: int, rng: np.random.Generator) -> tuple:
    """All codes that are numbers, scales of many sizes; and the numbers they stand for, in float64."""
    if format == "bf16":
        held = rng.standard_normal((rows, cols)).astype(ml_dtypes.bfloat16)
        return (held, None), held.astype(np.float64)
    if format == "fp8":
        codes = rng.permutation(np.resize([code for code in range(256) if code & 127 != 127], rows * cols))
        codes = codes.reshape(rows, cols).astype(np.uint8)
        scales = np.exp2(rng.uniform(-20, 3, (rows, cols // 64))).astype(np.float32)
        return (codes, scales), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.repeat(scales, 64, axis=1)
    codes, scales = rng.integers(0, 16, (rows, cols), np.uint8), rng.integers(100, 129, (rows, cols // 32), np.uint8)
    return (mxfp4.pack(codes), scales), mxfp4.decode(codes, scales).astype(np.float64)


def input_words(x_TI: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns to a word, as the stream holds them; and the numbers they stand for."""
    half, factor = (np.float16, 2.0**-INPUT_SHIFT) if format == "fp8" else (ml_dtypes.bfloat16, 1.0)
    held = (x_TI * factor).astype(half)
    return held.view(np.int32), held.astype(np.float64) / factor


def pages(words: np.ndarray, width: int) -> np.ndarray:
    """Every `width` words of a token with a gap behind them: [parts, tokens, width + gap]."""
    parts = words.reshape(len(words), -1, width).swapaxes(0, 1)
    return np.concatenate([parts, np.full((*parts.shape[:2], PAGE_GAP), -1, np.int32)], axis=-1)


def multiply(matrix: Matrix, packed: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, emulated.Emulated]:
    """The sums of all row blocks float32 [tokens, rows], each block an item; two parts in the page at a time."""
    tokens, lanes = len(words), emulated.Emulated()
    sums = np.full((matrix.row_blocks, tokens * SUM_STRIDE), GARBAGE, np.float32)
    scratch = np.full(4 * tokens * SUM_STRIDE, GARBAGE, np.float32)
    parts = pages(words, matrix.columns.part_cols // 2)
    tile = products.multiply_chunk(matrix, tokens)
    for chunk in range(matrix.columns.chunks):
        part, within = divmod(chunk * matrix.columns.chunk_cols, matrix.columns.part_cols)
        page = np.full((2, *parts.shape[1:]), -1, np.int32)
        page[part % 2] = parts[part]
        first = part % 2 * parts[0].size + within // 2
        for item in range(matrix.row_blocks):
            scalars = {"item": item, "first": first, "is_first": int(chunk == 0)}
            emulated.run(tile, [packed[item, chunk].copy(), page, sums, scratch], scalars, lanes)
    token, row = np.arange(tokens)[:, None], np.arange(ROWS)
    return sums[:, products.place(token, row)].swapaxes(0, 1).reshape(tokens, -1), lanes


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(40, 3072, 8), (16, 2048, 16), (16, 512, 8)])
def test_products_are_those_of_the_numbers(format, rows, cols, tokens):
    """Within float32's rounding of float64 sums over the dequantised weights; several parts, chunks and row blocks."""
    rng = np.random.default_rng(rows + cols)
    matrix = Matrix(rows, cols, format)
    given, weights_OI = random_weights(format, rows, cols, rng)
    words, x_TI = input_words(rng.standard_normal((tokens, cols)) * 4, format)
    found, lanes = multiply(matrix, weights.pack(matrix, *given), words)
    expected, size = x_TI @ weights_OI.T, np.abs(x_TI) @ np.abs(weights_OI).T
    assert np.max(np.abs(found[:, :rows] - expected) / size) < 2e-7
    assert not found[:, rows:].any()
    assert lanes.conflicts == 0


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_is_its_number(format):
    """One input of 1 at each column in turn brings out the weight itself: all 254 of e4m3, all 16 of e2m1, in bits."""
    rng = np.random.default_rng(4)
    matrix = Matrix(16, 512, format)
    given, weights_OI = random_weights(format, 16, 512, rng)
    packed = weights.pack(matrix, *given)
    for first in (0, 32, 240, 496):
        words, _ = input_words(np.eye(16, 512, first), format)
        found, _ = multiply(matrix, packed, words)
        np.testing.assert_array_equal(found, weights_OI[:, first : first + 16].T.astype(np.float32))


def test_e4m3_decodes_as_ml_dtypes_does():
    """All 256 codes, the two NaNs and the subnormals among them."""
    codes = np.resize(np.arange(256, dtype=np.uint8), 512)
    out = np.zeros((128, 2), np.int32)

    def tile(lanes, memories, _):
        (word,) = lanes.load(memories[0], lanes.thread, "i32")
        lanes.store(products._decoded_fp8(lanes, word), memories[1], lanes.thread * 2)

    emulated.run(tile, [codes.view(np.int32), out])
    np.testing.assert_array_equal(
        out.view(np.float16).reshape(-1), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_has_the_same_bits_in_any_company(format):
    """Alone in 8, in another place among 16 others, or beside numbers that are none."""
    rng = np.random.default_rng(5)
    matrix = Matrix(16, 1536, format)
    given, _ = random_weights(format, 16, 1536, rng)
    packed = weights.pack(matrix, *given)
    token, _ = input_words(rng.standard_normal((1, 1536)), format)
    others, _ = input_words(rng.standard_normal((16, 1536)), format)
    alone = np.zeros((8, 768), np.int32)
    broken = np.full((8, 768), 0x7FC07FC0, np.int32)
    alone[0], broken[3], others[13] = token, token, token
    expected = multiply(matrix, packed, alone)[0][0]
    assert expected.all()
    for words, place in ((broken, 3), (others, 13)):
        np.testing.assert_array_equal(multiply(matrix, packed, words)[0][place], expected)


def test_parts_add_in_their_order():
    """Four warps' parts of a chunk in order, and chunks in theirs: in bits as float32 NumPy adds them, no other way."""
    rng = np.random.default_rng(6)
    matrix = Matrix(16, 1024, "bf16")
    one_each = np.exp2(rng.integers(0, 16, (16, 4, 4))) * rng.standard_normal((16, 4, 4))
    weights_OI = np.zeros((16, 4, 4, matrix.warp_cols), ml_dtypes.bfloat16)
    weights_OI[..., 5] = one_each
    words, x_TI = input_words(np.tile(rng.standard_normal((1, 1024)), (8, 1)), "bf16")
    found, _ = multiply(matrix, weights.pack(matrix, weights_OI.reshape(16, 1024)), words)
    parts = (weights_OI.astype(np.float32) * x_TI[3].astype(np.float32).reshape(4, 4, -1))[..., 5].transpose(2, 1, 0)

    def added(warps: tuple[int, ...], chunks: tuple[int, ...]) -> np.ndarray:
        by_chunk = functools.reduce(operator.add, [parts[warp] for warp in warps])
        return functools.reduce(operator.add, [by_chunk[chunk] for chunk in chunks])

    in_order = (0, 1, 2, 3)
    np.testing.assert_array_equal(found[3], added(in_order, in_order))
    for other in ((1, 2, 0, 3), (3, 2, 1, 0), (0, 1, 3, 2)):
        assert (added(other, in_order) != found[3]).any() and (added(in_order, other) != found[3]).any()


def test_warps_wait_for_each_other():
    """Two chunks, the item's rows, and the next item's chunk, one after the other: no thread overtakes another one."""
    matrix, tokens = Matrix(16, 512, "bf16"), 8
    chunk, rows = products.multiply_chunk(matrix, tokens), products.store_rows(16, tokens, False)

    def tile(lanes, memories, scalars):
        slot, page, sums, scratch, out = memories
        for is_first in (1, 0):
            chunk(lanes, (slot, page, sums, scratch), scalars | {"is_first": lanes.constant(is_first, "i32")})
        rows(lanes, (sums, out), scalars)
        chunk(lanes, (slot, page, sums, scratch), scalars | {"is_first": lanes.constant(1, "i32")})

    slot, page = np.zeros(matrix.slot_words, np.int32), np.zeros(tokens * (256 + PAGE_GAP), np.int32)
    sums, scratch, out = (np.zeros(words, np.float32) for words in (8 * SUM_STRIDE, 32 * SUM_STRIDE, 8 * ROWS))
    emulated.run(tile, [slot, page, sums, scratch, out], {"item": 0, "first": 0, "block": 0})


class Interpreting(emulated.Emulated):
    """Holds the text of inline code on integers against its twin in NumPy."""

    def asm(self, text, inputs, kinds, twin, volatile=False):
        found = super().asm(text, inputs, kinds, twin, volatile)
        if all(kind == "i32" for kind in kinds):
            for thread in range(0, 128, 5):
                given = [int(value.held[thread]) & 0xFFFFFFFF for value in inputs]
                assert run_ptx(text, given, len(kinds)) == [int(value.held[thread]) & 0xFFFFFFFF for value in found]
        return found


def run_ptx(text: str, inputs: list[int], outputs: int) -> list[int]:
    """Instructions on 32 bits, one after the other; `{lo, hi}` are the halves of a register."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def read(name: str) -> int:
        if name.startswith("{"):
            low, high = map(read, name.strip("{}").split(", "))
            return low | high << 16
        return registers[name] if name in registers else int(name, 0)

    for statement in text.strip()[1:-1].split(";"):
        opcode, _, operands = statement.strip().partition(" ")
        if opcode in ("", ".reg"):
            continue
        target, *sources = re.findall(r"\{[^}]*\}|[^,\s]+", operands)
        value = PTX[opcode](*map(read, sources)) & 0xFFFFFFFF
        if target.startswith("{"):
            low, high = target.strip("{}").split(", ")
            registers |= {low: value & 0xFFFF, high: value >> 16}
        else:
            registers[target] = value
    return [registers[f"${i}"] for i in range(outputs)]


def pair_of(word: int, dtype) -> np.ndarray:
    """The two numbers in the lowest bits."""
    return np.array([word], np.uint32).view(dtype)[:2]


def word_of(pair: np.ndarray) -> int:
    return int(np.ascontiguousarray(pair).view(np.uint32)[0])


PTX = {  # by the PTX ISA
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "shf.l.wrap.b32": lambda low, high, by: (high << 32 | low) << by >> 32,
    "prmt.b32": lambda a, b, s: sum(((b << 32 | a) >> 8 * (s >> 4 * i & 7) & 255) << 8 * i for i in range(4)),
    "mul.rn.bf16x2": lambda a, b: word_of(pair_of(a, ml_dtypes.bfloat16) * pair_of(b, ml_dtypes.bfloat16)),
    "cvt.rn.f16x2.e4m3x2": lambda a: word_of(pair_of(a, ml_dtypes.float8_e4m3fn).astype(np.float16)),
}


@pytest.mark.parametrize("format", ["mxfp4", "fp8"])
def test_inline_code_does_what_its_twin_does(format):
    """The text that is assembled, interpreted instruction by instruction, leaves the bits that NumPy does."""
    matrix, lanes = Matrix(16, 512, format), Interpreting()
    given, _ = random_weights(format, 16, 512, np.random.default_rng(7))
    slot = weights.pack(matrix, *given)[0, 0].copy()
    page, sums, scratch = (
        np.zeros(words, np.int32) for words in (8 * (256 + PAGE_GAP), 8 * SUM_STRIDE, 32 * SUM_STRIDE)
    )
    scalars = {"item": 0, "first": 0, "is_first": 1}
    emulated.run(products.multiply_chunk(matrix, 8), [slot, page, sums, scratch], scalars, lanes)


def sums_of(x_TO: np.ndarray, items: int) -> np.ndarray:
    """A buffer of sums whose last item holds these, of one row block."""
    tokens = len(x_TO)
    sums = np.full((items, tokens * SUM_STRIDE), GARBAGE, np.float32)
    sums[-1, products.place(np.arange(tokens)[:, None], np.arange(ROWS))] = x_TO
    return sums


@pytest.mark.parametrize(("tokens", "ways"), [(8, 4), (16, 4), (8, 2)])
def test_teams_add_in_the_order_of_chunks(tokens, ways):
    """From whichever team had the first chunk on, in bits: the sum tells neither that team nor the CTA's first item."""
    rng = np.random.default_rng(8)
    parts = rng.standard_normal((ways, tokens, 16)).astype(np.float32)
    expected = functools.reduce(operator.add, parts)
    for team in range(4):
        sums = np.full((4, 3, tokens * SUM_STRIDE), GARBAGE, np.float32)
        for way in range(ways):
            sums[(team + way) % 4] = sums_of(parts[way], 3)
        emulated.run(products.add_teams(tokens, ways, 3), [sums], {"item": 2, "team": team})
        found = sums[0, 2, products.place(np.arange(tokens)[:, None], np.arange(ROWS))]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("tokens", [8, 16])
def test_rows_are_stored_where_they_belong(tokens):
    """Times the token's factor or not; rows that the matrix does not have are nowhere; own columns go by item."""
    rng = np.random.default_rng(tokens)
    x_TO, factors = rng.standard_normal((tokens, 16)).astype(np.float32), rng.standard_normal(tokens).astype(np.float32)
    for has_factors in (False, True):
        out = np.zeros((tokens, 40), np.float32)
        memories = [sums_of(x_TO, 3), out, *([factors] if has_factors else [])]
        emulated.run(products.store_rows(40, tokens, has_factors), memories, {"item": 2, "block": 2})
        expected = x_TO * factors[:, None] if has_factors else x_TO
        np.testing.assert_array_equal(out[:, 32:], expected[:, :8])
        assert not out[:, :32].any()
    own = np.zeros((tokens, 48), np.float32)
    emulated.run(products.store_own(48, tokens), [sums_of(x_TO, 2), own], {"item": 1})
    np.testing.assert_array_equal(own[:, 16:32], x_TO)
    assert not own[:, :16].any() and not own[:, 32:].any()


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(("kind", "is_routed"), [("bf16", False), ("f16", False), ("bf16", True)])
def test_gate_and_up_become_hidden_features(tokens, kind, is_routed):
    """silu(gate) * up of eight features, gates of -100 to 100; a routed token's row is its pair's, and none for -1."""
    rng = np.random.default_rng(tokens)
    x_TO = (rng.standard_normal((tokens, 16)) * 30).astype(np.float32)
    factors = rng.uniform(0.5, 2, tokens).astype(np.float32)
    rows, unit = 3 * tokens, 1
    pairs = rng.permutation(rows)[: 2 * tokens].astype(np.int32)
    pairs[tokens + 2 :: 3] = -1
    hidden = np.full((rows, 20), 7, np.int32)  # 32 features, and a gap
    scalars = {"item": 1, "block": 2} | ({"unit": unit} if is_routed else {})
    memories = [sums_of(x_TO, 2), hidden, factors, *([pairs] if is_routed else [])]
    emulated.run(
        products.store_activated(lambda row, feature: row * 20 + feature // 2, tokens, kind, is_routed),
        memories,
        scalars,
    )

    scaled = x_TO.astype(np.float64) * factors[:, None]
    gate, up = scaled[:, :8], scaled[:, 8:]
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    owners = pairs[unit * tokens :] if is_routed else np.arange(tokens)
    dtype, factor = (np.float16, 2.0**INPUT_SHIFT) if kind == "f16" else (ml_dtypes.bfloat16, 1.0)
    found = hidden[owners[owners >= 0], 8:12].view(dtype).astype(np.float64) * factor
    np.testing.assert_allclose(found, expected[owners >= 0], rtol=2**-8, atol=2**-18)
    untouched = np.ones(hidden.shape, bool)
    untouched[owners[owners >= 0], 8:12] = False
    assert (hidden[untouched] == 7).all()


@pytest.mark.parametrize(
    ("features", "most", "tokens", "tiles", "splits"),
    [(256, 3, 8, 3, 2), (256, 3, 16, 2, 2), (128, 1, 8, 1, 1), (512, 3, 8, 2, 4), (512, 1, 8, 1, 2)],
)
@pytest.mark.parametrize("units", [3, 4])
def test_down_of_experts_and_the_sum_of_choices(features, most, tokens, tiles, splits, units):
    """Each pair's 16 to 48 columns as in float64, no other touched; choices add up, absent ones do nothing.

    The last of the experts' slots, whose second half is of nobody if their number is odd.
    """
    rng = np.random.default_rng(features + tokens)
    chosen, down = 2, Down(features, most)
    number = (units - 1) // down.units
    experts = range(number * down.units, units)
    slot = np.full((down.units, most, down.tile_words), -1, np.int32)
    pairs, all_weights = np.full((units, tokens), -1, np.int32), []
    for half, expert in enumerate(experts):
        given, weights_OI = random_weights("mxfp4", 48, features, rng)
        slot[half, :tiles] = weights.pack_down(*given)[:tiles]
        takes_part = np.arange(tokens) % 3 != half
        pairs[expert] = np.where(takes_part, np.arange(tokens) * chosen + (np.arange(tokens) + expert) % 2, -1)
        all_weights.append(weights_OI)
    words, x_PF = input_words(rng.standard_normal((tokens * chosen, features)), "bf16")
    out = np.full((splits, tokens * chosen, products.OWN_COLUMNS), GARBAGE, np.float32)
    memories = [slot, pages(words, features // 2)[0], out, pairs]
    scalars = {"number": number, "units": units, "tiles": tiles}
    emulated.run(products.multiply_expert_down(down, chosen, tokens), memories, scalars)
    found, written = out.sum(axis=0), np.zeros(out.shape[1:], bool)
    for expert, weights_OI in zip(experts, all_weights):
        own = pairs[expert][pairs[expert] >= 0]
        written[own, : 16 * tiles] = True
        expected, size = x_PF[own] @ weights_OI.T, np.abs(x_PF[own]) @ np.abs(weights_OI).T
        error = np.abs(found[own] - expected) / size
        assert np.max(error[:, : 16 * tiles]) < 2e-7
    np.testing.assert_array_equal(np.isfinite(out), np.broadcast_to(written, out.shape))

    mine = pairs[pairs >= 0]
    chosen_weights = np.zeros((tokens, chosen), np.float32)
    chosen_weights.reshape(-1)[mine] = rng.uniform(0.1, 1, mine.size)
    own = np.full((tokens, products.OWN_COLUMNS), GARBAGE, np.float32)
    for team in range(4):
        tile = products.combine(chosen, tokens, splits)
        emulated.run(tile, [chosen_weights, out, own], {"team": team, "tiles": tiles})
    weighed = chosen_weights.reshape(-1)[mine, None] * np.nan_to_num(found[mine]).astype(np.float64)
    total, size = np.zeros((2, tokens, products.OWN_COLUMNS))
    np.add.at(total, mine // chosen, weighed)
    np.add.at(size, mine // chosen, np.abs(weighed))
    np.testing.assert_array_less(np.abs(own - total)[:, : 16 * tiles], 2e-7 * size[:, : 16 * tiles] + 1e-30)
    assert np.isnan(own[:, 16 * tiles :]).all()


def test_choices_add_in_their_order():
    """In float32 the three numbers give 1 in no other order of the fused additions."""
    weights_TX = np.ones((8, 3), np.float32)
    out = np.tile(np.float32([[2.0**25], [-(2.0**25)], [1]]), (8, products.OWN_COLUMNS))
    own = np.zeros((8, products.OWN_COLUMNS), np.float32)
    for team in range(4):
        emulated.run(products.combine(3, 8, 1), [weights_TX, out, own], {"team": team, "tiles": 3})
    assert (own == 1).all()
