"""The tiles of the residual stream against float64, by emulation; and as machine code for an H200 that is not there."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.decode_step.hopper import stream
from pallas_kernels.decode_step.hopper.config import FORMATS, INPUT_SHIFT, INPUT_TYPE, PAGE_GAP, ROWS, Columns
from pallas_kernels.decode_step.hopper.stream import Stream
from pallas_kernels.lanes import emulated
from tests.kernels.decode_step.hopper.tile_tools import GLOBAL, MOST_REGISTERS, SHARED, machine_code
from tests.kernels.triton_tools import needs_compiler

WIDTH, OWN, LAYERS, VOCAB, TAPS, EPS = 512, 48, 3, 100, 2, 1e-5
GARBAGE = np.float32("nan")
HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def shares(ctas: int) -> list[tuple[int, int]]:
    """First column and number of columns of each CTA: 13 have 48 or 32, 40 have 16 or none; the last one has none."""
    bounds = [cta * (WIDTH // ROWS) // (ctas - 1) * ROWS for cta in range(ctas)]
    return [(first, last - first) for first, last in itertools.pairwise([*bounds, WIDTH])]


def blank(*shape: int) -> np.ndarray:
    return np.full(shape, GARBAGE, np.float32)


def pairs(values: np.ndarray, kind: str) -> np.ndarray:
    """Rounded to halves, two to a word."""
    return np.ascontiguousarray(values.astype(HALVES[kind])).view(np.int32)


class Run:
    """A stream of random numbers and what the tiles make of it, CTA by CTA; all that is to be written is NaN before."""

    def __init__(self, tokens: int, count: int, reader: str = "bf16", ctas: int = 13, devices: int = 3) -> None:
        rng = np.random.default_rng(5)
        self.stream, self.count, self.shares = Stream(tokens, WIDTH, Columns(WIDTH, 1), OWN), count, shares(ctas)
        self.reader = FORMATS.index(reader)
        self.gain = rng.uniform(0.5, 2, (LAYERS, WIDTH)).astype(np.float32)
        self.x = rng.standard_normal((16, WIDTH)).astype(np.float32)[:tokens]
        self.sent = rng.standard_normal((devices, 16, WIDTH)).astype(np.float32)[:, :tokens]
        self.x[count:], self.sent[:, count:] = GARBAGE, GARBAGE
        self.inputs = np.full((tokens, WIDTH // 2 + PAGE_GAP), -1, np.int32)
        self.squares, self.factors, self.aux = blank(ctas, tokens), blank(tokens), blank(tokens, TAPS, WIDTH)
        self.hidden = blank(tokens, WIDTH)

    def each(self, tile, *memories: np.ndarray, **scalars: int) -> None:
        for cta, (first, size) in enumerate(self.shares):
            emulated.run(tile, memories, self.scalars(cta, first, size) | scalars)

    def scalars(self, cta: int, first: int, size: int) -> dict[str, int]:
        own = {"cta": cta, "first": first, "size": size}
        return own | {"count": self.count, "gain_first": 2 * WIDTH, "reader": self.reader}

    def reduce(self, tap: int = -1, aux: str = "f32"):
        tile = stream.reduce(self.stream, len(self.sent), TAPS, aux)
        for cta, (first, size) in enumerate(self.shares):
            parts = blank(len(self.sent), self.stream.tokens, OWN)
            parts[..., :size] = self.sent[..., first : first + size]
            kept, scalars = blank(self.stream.tokens, OWN), self.scalars(cta, first, size)
            emulated.run(stream.resume(self.stream), (self.x, kept), {"first": first, "size": size})
            memories = (parts, self.gain, kept, self.x, self.inputs, self.squares, self.aux)
            emulated.run(tile, memories, scalars | {"tap": tap})
            np.testing.assert_array_equal(kept[:, :size], self.x[:, first : first + size])
        return self

    def scale(self):
        emulated.run(stream.factors(self.stream, len(self.shares), EPS), (self.squares, self.factors))
        return self


@pytest.mark.parametrize("reader", FORMATS)
@pytest.mark.parametrize(("tokens", "count", "ctas"), [(8, 5, 13), (16, 16, 13), (16, 9, 40)])
def test_the_stream_is_summed_and_scaled(tokens, count, ctas, reader):
    """Parts are added in the devices' order in float32, bit for bit; inputs are x * gain rounded once; squares add up.

    CTAs own 48, 32, 16 columns or none. Padding holds NaN before, and zeros after.
    """
    run = Run(tokens, count, reader, ctas)
    expected = run.x.copy()
    for part in run.sent:
        expected += part
    expected[count:] = 0
    run.reduce()
    np.testing.assert_array_equal(run.x, expected)
    scaled = expected * run.gain[2] * np.float32(2.0 ** INPUT_SHIFT[reader])
    np.testing.assert_array_equal(run.inputs[:, :-PAGE_GAP], pairs(scaled, INPUT_TYPE[reader]))
    sizes = [expected[:, first : first + size].astype(np.float64) ** 2 for first, size in run.shares]
    np.testing.assert_allclose(run.squares, [part.sum(axis=1) for part in sizes], rtol=5e-7)
    assert np.isnan(run.aux).all()


@pytest.mark.parametrize("aux", ["f32", "bf16"])
def test_a_tap_shows_the_stream(aux):
    """The tap that a scalar names receives the stream, as floats or rounded to bf16; the other one nothing."""
    run = Run(8, 8)
    run.aux = blank(8, TAPS, WIDTH) if aux == "f32" else np.full((8, TAPS, WIDTH // 2), -1, np.int32)
    before = run.aux.copy()
    run.reduce(tap=1, aux=aux)
    np.testing.assert_array_equal(run.aux[:, 1], run.x if aux == "f32" else pairs(run.x, "bf16"))
    np.testing.assert_array_equal(run.aux[:, 0], before[:, 0])


def test_a_token_does_not_depend_on_others():
    """A token's stream, inputs and factor have the same bits alone among 8 and in company among 16."""
    alone, together = Run(8, 1).reduce().scale(), Run(16, 16).reduce().scale()
    for name in ("x", "inputs", "factors"):
        np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[0])
    np.testing.assert_array_equal(alone.squares[:, 0], together.squares[:, 0])


@pytest.mark.parametrize(("tokens", "count"), [(8, 8), (16, 11)])
def test_embedding(tokens, count):
    """Tokens' rows of a table of bf16, as the first stream; an id beyond the table reads nothing outside of it."""
    run, rng = Run(tokens, count), np.random.default_rng(6)
    table = rng.standard_normal((VOCAB, WIDTH)).astype(ml_dtypes.bfloat16)
    ids = rng.integers(0, VOCAB, tokens).astype(np.int32)
    ids[count - 1], ids[0] = VOCAB + 7, -3
    tile = stream.embed(run.stream, VOCAB)
    kept = blank(tokens, OWN)  # the next CTA's columns are stored over
    run.each(tile, ids, table.view(np.int32), run.gain, kept, run.x, run.inputs, run.squares)
    expected = table.astype(np.float32)[np.clip(ids, 0, VOCAB - 1)]
    expected[count:] = 0
    np.testing.assert_array_equal(run.x, expected)
    np.testing.assert_array_equal(run.inputs[:, :-PAGE_GAP], pairs(expected * run.gain[2], "bf16"))
    np.testing.assert_allclose(run.squares.sum(axis=0), (expected.astype(np.float64) ** 2).sum(axis=1), rtol=1e-6)


@pytest.mark.parametrize("ctas", [3, 13, 132])
def test_factors(ctas):
    """1 / sqrt(mean of squares + eps) of all CTAs' parts, whatever their number."""
    squares = np.random.default_rng(7).uniform(0, 50, (ctas, 16)).astype(np.float32)
    squares[:, 3] = 0
    found, seen = blank(16), blank(128)

    def tile(lanes, memories, scalars):
        """And every thread reads at once what another one has written."""
        stream.factors(Stream(16, 6144, Columns(6144, 1), OWN), ctas, EPS)(lanes, memories[:2], scalars)
        lanes.store([lanes.load_one(memories[1], lanes.thread % 16)], memories[2], lanes.thread)

    emulated.run(tile, (squares, found, seen))
    np.testing.assert_array_equal(seen, np.tile(found, 8))
    expected = (squares.astype(np.float64).sum(axis=0) / 6144 + EPS) ** -0.5
    np.testing.assert_allclose(found, expected, rtol=5e-7)


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_the_final_norm(kind):
    """The equation of RMSNorm in float64, of real tokens; zeros of padding."""
    run = Run(16, 9).reduce().scale()
    hidden = run.hidden if kind == "f32" else np.full((16, WIDTH // 2), -1, np.int32)
    run.each(stream.finish(run.stream, kind), run.x, run.factors, run.gain, hidden)
    x = run.x.astype(np.float64)
    expected = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * run.gain[2]
    found = hidden if kind == "f32" else hidden.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6 if kind == "f32" else 2**-8)
    assert not found[9:].any()


def tile_of(name: str, tokens: int) -> tuple:
    """A tile at Pro's sizes on eight devices, where its memories are and their words."""
    config, factors, gain = Stream(tokens, 6144, Columns(6144, 1), OWN), (SHARED, tokens), (GLOBAL, 6144)
    kept = (SHARED, tokens * OWN)
    x, words, squares = (GLOBAL, tokens * 6144), (GLOBAL, tokens * 3136), (GLOBAL, 132 * tokens)
    ids, table, parts = (GLOBAL, tokens), (GLOBAL, VOCAB * 3072), (GLOBAL, 8 * tokens * OWN)
    return {
        "embed": (stream.embed(config, VOCAB), [ids, table, gain, kept, x, words, squares]),
        "reduce": (stream.reduce(config, 8, TAPS), [parts, gain, kept, x, words, squares, (GLOBAL, TAPS * x[1])]),
        "factors": (stream.factors(config, 132, EPS), [squares, factors]),
        "finish": (stream.finish(config), [x, factors, gain, x]),
    }[name]


@needs_compiler
@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize("name", ["embed", "reduce", "factors", "finish"])
def test_nothing_is_spilled(name, tokens, tmp_path, monkeypatch):
    """Pro's stream on eight devices keeps all state of a thread in the registers it has beside the other tiles."""
    scalars = ["first", "size", "cta", "count", "gain_first", "reader", "tap"]
    registers, stack, spilled = machine_code(*tile_of(name, tokens), scalars, tmp_path, monkeypatch)
    assert stack == spilled == 0 and registers <= MOST_REGISTERS
