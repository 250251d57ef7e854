"""Tiles of matrix products against float64, by emulation."""

import functools
import operator
import re

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import mxfp4
from pallas_kernels.decode_step.hopper import products, weights
from pallas_kernels.decode_step.hopper.config import INPUT_SHIFT, INPUT_TYPE, PAGE_GAP, ROWS, WARPS, Down, Matrix
from pallas_kernels.lanes import emulated
from pallas_kernels.lanes.values import half_type

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
    codes, scales = rng.integers(0, 16, (rows, cols), np.uint8), rng.integers(100, 140, (rows, cols // 32), np.uint8)
    return (mxfp4.pack(codes), scales), mxfp4.decode(codes, scales).astype(np.float64)


def input_words(x_TI: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns to a word, as the stream holds them; and the numbers they stand for."""
    factor = 2.0 ** INPUT_SHIFT[format]
    held = (x_TI * factor).astype(half_type(INPUT_TYPE[format]))
    return held.view(np.int32), held.astype(np.float64) / factor


def pages(words: np.ndarray, width: int) -> np.ndarray:
    """Every `width` words of a token with a gap behind them: [parts, tokens, width + gap]."""
    parts = words.reshape(len(words), -1, width).swapaxes(0, 1)
    return np.concatenate([parts, np.full((*parts.shape[:2], PAGE_GAP), -1, np.int32)], axis=-1)


def multiply(
    matrix: Matrix, packed: np.ndarray, words: np.ndarray, ways: int = 1
) -> tuple[np.ndarray, emulated.Emulated]:
    """The sums of all row blocks float32 [tokens, rows], each block an item; two parts in the page at a time.

    Of `ways` teams, one has a chunk, the next one the next.
    """
    tokens, lanes = len(words), emulated.Emulated(counts_conflicts=True)
    sums = np.full((matrix.row_blocks * ways, WARPS, tokens * ROWS), GARBAGE, np.float32)
    parts = pages(words, matrix.columns.part_cols // 2)
    tile = products.multiply_chunk(matrix, tokens)
    for chunk in range(matrix.columns.chunks):
        part, within = divmod(chunk * matrix.columns.chunk_cols, matrix.columns.part_cols)
        page = np.full((2, *parts.shape[1:]), -1, np.int32)
        page[part % 2] = parts[part]
        first = part % 2 * parts[0].size + within // 2
        for item in range(matrix.row_blocks):
            scalars = {"part": item * ways + chunk % ways, "first": first, "is_first": int(chunk < ways)}
            emulated.run(tile, [packed[item, chunk].copy(), page, sums], scalars, lanes)
    out = np.full((tokens, matrix.row_blocks * ROWS), GARBAGE, np.float32)
    rows = products.store_rows(out.shape[1], tokens, ways, False)
    for item in range(matrix.row_blocks):
        emulated.run(rows, [sums, out], {"item": item, "block": item})
    return out, lanes


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


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_parts_add_in_their_order(ways):
    """A warp's chunks in each team, then the teams', then the warps': in bits as float32 NumPy adds them."""
    rng = np.random.default_rng(6)
    matrix = Matrix(16, 1024, "bf16")
    one_each = np.exp2(rng.integers(0, 16, (16, 4, 4))) * rng.standard_normal((16, 4, 4))
    weights_OI = np.zeros((16, 4, 4, matrix.warp_cols), ml_dtypes.bfloat16)
    weights_OI[..., 5] = one_each
    words, x_TI = input_words(np.tile(rng.standard_normal((1, 1024)), (8, 1)), "bf16")
    packed = weights.pack(matrix, weights_OI.reshape(16, 1024))
    found, _ = multiply(matrix, packed, words, ways)
    parts = (weights_OI.astype(np.float32) * x_TI[3].astype(np.float32).reshape(4, 4, -1))[..., 5].transpose(1, 2, 0)

    def added(warps: tuple[int, ...]) -> np.ndarray:
        by_way = [functools.reduce(operator.add, parts[way::ways]) for way in range(ways)]
        return functools.reduce(
            operator.add, [functools.reduce(operator.add, [part[warp] for part in by_way]) for warp in warps]
        )

    np.testing.assert_array_equal(found[3], added((0, 1, 2, 3)))
    if ways == 4:  # a chunk for each team: as if there were one
        np.testing.assert_array_equal(found[3], multiply(matrix, packed, words)[0][3])
    for other in ((1, 2, 0, 3), (3, 2, 1, 0), (0, 1, 3, 2)):
        assert (added(other) != found[3]).any()


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
    page, sums = (np.zeros(words, np.int32) for words in (8 * (256 + PAGE_GAP), WARPS * 8 * ROWS))
    scalars = {"part": 0, "first": 0, "is_first": 1}
    emulated.run(products.multiply_chunk(matrix, 8), [slot, page, sums], scalars, lanes)


def place(token: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Where an item's sums have this one: a thread's four side by side, threads in order, eight tokens after eight."""
    thread = row % 8 * 4 + token % products.TOKENS // 2
    return token // products.TOKENS * products.FRAGMENT + thread * 4 + row // 8 * 2 + token % 2


def sums_of(tokens: int, items: int, ways: int, rng: np.random.Generator, size: float = 1) -> tuple:
    """A buffer of sums whose last item has parts of this size; and these, added in their order, [tokens, 16]."""
    sums = np.full((items, ways * WARPS, tokens * ROWS), GARBAGE, np.float32)
    parts = (rng.standard_normal((ways * WARPS, tokens, ROWS)) * size).astype(np.float32)
    sums[-1][:, place(np.arange(tokens)[:, None], np.arange(ROWS))] = parts
    by_warp = [functools.reduce(operator.add, parts[warp::WARPS]) for warp in range(WARPS)]
    return sums, functools.reduce(operator.add, by_warp)


@pytest.mark.parametrize("tokens", [8, 16])
def test_rows_are_stored_where_they_belong(tokens):
    """Times the token's factor or not; rows that the matrix does not have are nowhere; own columns go by item."""
    rng = np.random.default_rng(tokens)
    factors = rng.standard_normal(tokens).astype(np.float32)
    for has_factors, ways in ((False, 4), (True, 1)):
        out, (sums, x_TO) = np.zeros((tokens, 40), np.float32), sums_of(tokens, 3, ways, rng)
        memories = [sums, out, *([factors] if has_factors else [])]
        emulated.run(products.store_rows(40, tokens, ways, has_factors), memories, {"item": 2, "block": 2})
        expected = x_TO * factors[:, None] if has_factors else x_TO
        np.testing.assert_array_equal(out[:, 32:], expected[:, :8])
        assert not out[:, :32].any()
    own, (sums, x_TO) = np.zeros((tokens, 48), np.float32), sums_of(tokens, 2, 3, rng)
    emulated.run(products.store_own(48, tokens, 3), [sums, own], {"item": 1})
    np.testing.assert_array_equal(own[:, 16:32], x_TO)
    assert not own[:, :16].any() and not own[:, 32:].any()


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(("format", "is_routed"), [("bf16", False), ("fp8", False), ("mxfp4", True)])
def test_gate_and_up_become_hidden_features(tokens, format, is_routed):
    """silu(gate) * up of eight features, gates of -100 to 100; a routed token's row is its pair's, and none for -1.

    Of the four warps' items the second is the last one that there is, and the second block of its unit.
    """
    rng = np.random.default_rng(tokens)
    sums, x_TO = sums_of(tokens, 2, 2, rng, 10)
    factors = rng.uniform(0.5, 2, tokens).astype(np.float32)
    rows, unit, blocks = 3 * tokens, 1, 3
    pairs = rng.permutation(rows)[: 2 * tokens].astype(np.int32)
    pairs[tokens + 2 :: 3] = -1
    sums[0], pairs[:tokens] = 1, -1  # the first item's unit has no token
    hidden = np.full((rows, 20), 7, np.int32)  # 32 features, and a gap
    scalars = {"item": 0, "items": 2, "block": unit * blocks - 1 if is_routed else 1}
    memories = [sums, hidden, factors, *([pairs] if is_routed else [])]
    place_of = lambda row, feature: row * 20 + feature // 2  # noqa: E731
    tile = products.store_activated(place_of, tokens, 2, format, blocks if is_routed else None)
    emulated.run(tile, memories, scalars)

    scaled = x_TO.astype(np.float64) * factors[:, None]
    gate, up = scaled[:, :8], scaled[:, 8:]
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    owners = pairs[unit * tokens :] if is_routed else np.arange(tokens)
    first = 0 if is_routed else 8
    words = slice(first, first + 4)
    held = hidden[owners[owners >= 0], words].view(half_type(INPUT_TYPE[format]))
    found = held.astype(np.float64) * 2.0 ** -INPUT_SHIFT[format]
    np.testing.assert_allclose(found, expected[owners >= 0], rtol=2**-8, atol=2**-18)
    untouched = np.ones(hidden.shape, bool)
    untouched[owners[owners >= 0], words] = False
    if not is_routed:  # the first item's
        untouched[:tokens, 4:8] = False
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
        slot[half, most - tiles :] = weights.pack_down(*given)[:tiles]  # after what is another CTA's
        takes_part = np.arange(tokens) % 3 != half
        pairs[expert] = np.where(takes_part, np.arange(tokens) * chosen + (np.arange(tokens) + expert) % 2, -1)
        all_weights.append(weights_OI)
    words, x_PF = input_words(rng.standard_normal((tokens * chosen, features)), "mxfp4")
    out = np.full((splits, tokens * chosen, products.OWN_COLUMNS), GARBAGE, np.float32)
    memories = [slot, pages(words, features // 2)[0], out, pairs]
    scalars = {"number": number, "units": units, "before": most - tiles, "tiles": tiles}
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
