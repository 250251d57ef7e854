"""The residual stream between two products: embedded, summed over devices, scaled, and its RMS factors.

Each CTA owns columns [first, first + size) of the stream, whole row blocks of 16. Eight threads serve a token, each
with a pair of columns of every block, so the order of a sum of squares depends on no other token, nor on their number.

Products take x * gain; the factor of the norm is applied to their sums. Padding tokens are zeros throughout, whatever
the buffers hold: what is computed of them stays finite, also where a real token multiplies it by zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pallas_kernels.decode_step.hopper.config import FORMATS, INPUT_SHIFT, INPUT_TYPE, ROWS, Columns, Inputs
from pallas_kernels.decode_step.hopper.products import Tile, summed
from pallas_kernels.lanes import Lanes, Memory, Value
from pallas_kernels.lanes.values import F32, I32

THREADS = ROWS // 2  # of a token
Pair = tuple[Value, Value]  # of neighbouring columns


@dataclasses.dataclass(frozen=True)
class Stream:
    """Sizes of the residual stream."""

    tokens: int  # padded, 8 or 16
    width: int
    columns: Columns  # of the inputs: the width, padded
    own: int  # the most columns that a CTA owns

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.columns, self.tokens)


def resume(stream: Stream) -> Tile:
    """The CTA's columns of a stream that an earlier launch has left.

    Memories: x float32 [tokens, width]; kept float32 [tokens, own], in shared memory. Scalars: first, size.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        x, kept = memories
        own = _Own(lanes, stream, scalars)
        with lanes.when(own.token < stream.tokens):
            own.keep(own.pairs(x, own.token * stream.width), kept)

    return tile


def embed(stream: Stream, vocab: int) -> Tile:
    """Begins the stream with the tokens' rows of the embedding table; an id beyond it takes its last row.

    Memories: ids int32 [tokens]; table int32 [vocab, width / 2], pairs of bf16; gain, kept, x, inputs and squares as
    in `reduce`. Scalars: first, size, cta, count, gain_first and reader as in `reduce`.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        ids, table, gain, *out = memories
        own = _Own(lanes, stream, scalars)
        with lanes.when(own.token < stream.tokens):
            row = lanes.load_one(ids, own.token, I32).maximum(0).minimum(vocab - 1) * (stream.width // 2)
            words = [lanes.load_one(table, row + column // 2, I32) for column in own.columns]
            own.write([lanes.unpack(word) for word in words], own.gains(gain), out)

    return tile


def reduce(stream: Stream, devices: int, taps: int = 0, aux: str = F32) -> Tile:
    """Adds the devices' parts to the stream, in the order of the devices.

    Memories: parts float32 [devices, tokens, own], the CTA's columns; gain float32; kept float32 [tokens, own], the
    stream's columns, which the CTA keeps in shared memory; x float32 [tokens, width], a copy for others; inputs
    int32, pairs of x * gain, see `Inputs`; squares float32 [ctas, tokens], of each CTA's columns; and where there
    are `taps`, a copy of x: float32 [tokens, taps, width], or pairs of bf16 if `aux` is "bf16". Scalars: first, size,
    cta; count of real tokens; gain_first, the gain's element for column 0; reader, the number in FORMATS of the weights
    that read the inputs; with `taps` also tap, negative for none.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        parts, gain, kept, x, inputs, squares, *copy = memories
        own = _Own(lanes, stream, scalars)
        with lanes.when(own.token < stream.tokens):
            # All loads come before the first store: none waits for another.
            pairs = own.kept(kept)
            rows = [(source * stream.tokens + own.token) * stream.own for source in own.constants(range(devices))]
            added = [[_pair(lanes, parts, row + local) for local in own.locals] for row in rows]
            gains = own.gains(gain)
            for device in added:
                pairs = [(low + a, high + b) for (low, high), (a, b) in zip(pairs, device)]
            stored = own.write(pairs, gains, (kept, x, inputs, squares))
            if taps:
                with lanes.when(scalars["tap"] >= 0):
                    own.store(stored, copy[0], (own.token * taps + scalars["tap"]) * stream.width, aux)

    return tile


def factors(stream: Stream, ctas: int, eps: float) -> Tile:
    """1 / RMS of each token; all threads see them when it returns.

    Memories: squares float32 [ctas, tokens]; factors float32 [tokens] in shared memory.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        squares, found = memories
        token, part = lanes.thread // THREADS, lanes.thread % THREADS
        with lanes.when(token < stream.tokens):
            loaded = []
            for first in range(0, ctas, THREADS):
                cta = part + first
                value = lanes.load_one(squares, cta.minimum(ctas - 1) * stream.tokens + token)
                loaded.append(lanes.select(cta < ctas, value, lanes.constant(0, F32)))
            total = lanes.sum_over(summed(loaded), THREADS)
            factor = lanes.rsqrt(total * (1 / stream.width) + eps)
            with lanes.when(part.equals(0)):
                lanes.store([factor], found, token)
        lanes.barrier()

    return tile


def finish(stream: Stream, kind: str = F32) -> Tile:
    """The CTA's columns of the normalised stream.

    Memories: x float32 [tokens, width]; factors float32 [tokens]; gain float32; hidden
    float32 [tokens, width], or pairs of bf16 if `kind` is "bf16". Scalars: first, size, gain_first as in `reduce`.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        x, found, gain, hidden = memories
        own = _Own(lanes, stream, scalars)
        with lanes.when(own.token < stream.tokens):
            pairs, gains = own.pairs(x, own.token * stream.width), own.gains(gain)
            factor = lanes.load_one(found, own.token)
            normed = [(low * factor * a, high * factor * b) for (low, high), (a, b) in zip(pairs, gains)]
            own.store(normed, hidden, own.token * stream.width, kind)

    return tile


class _Own:
    """A thread's columns: a pair of each row block that a CTA may own.

    Of blocks beyond its share, columns that exist are read in vain, so that no load waits for a condition.
    """

    def __init__(self, lanes: Lanes, stream: Stream, scalars: dict[str, Value]) -> None:
        self.lanes, self.stream, self.scalars = lanes, stream, scalars
        self.token, pair = lanes.thread // THREADS, lanes.thread % THREADS
        blocks = self.constants(range(0, stream.own, ROWS))
        self.exist = [block < scalars["size"] for block in blocks]
        self.locals = [lanes.select(exists, block, blocks[0]) + pair * 2 for exists, block in zip(self.exist, blocks)]
        # A CTA without columns may begin where the stream ends.
        first = scalars["first"].minimum(stream.width - ROWS)
        self.columns = [first + local for local in self.locals]

    def constants(self, numbers: Sequence[int]) -> list[Value]:
        return [self.lanes.constant(number, I32) for number in numbers]

    def kept(self, memory: Memory) -> list[Pair]:
        """From [tokens, own]."""
        return [_pair(self.lanes, memory, self.token * self.stream.own + local) for local in self.locals]

    def keep(self, pairs: Sequence[Pair], memory: Memory) -> None:
        """Into [tokens, own]."""
        for exists, local, pair in zip(self.exist, self.locals, pairs):
            with self.lanes.when(exists):
                self.lanes.store(pair, memory, self.token * self.stream.own + local)

    def pairs(self, memory: Memory, first: Value) -> list[Pair]:
        """Of a row that begins at element `first`."""
        return [_pair(self.lanes, memory, first + column) for column in self.columns]

    def gains(self, gain: Memory) -> list[Pair]:
        return self.pairs(gain, self.scalars["gain_first"])

    def store(self, pairs: Sequence[Pair], memory: Memory, first: Value, kind: str) -> None:
        """Into a row that begins at element `first`, of floats or of so many halves."""
        for exists, column, pair in zip(self.exist, self.columns, pairs):
            with self.lanes.when(exists):
                if kind == F32:
                    self.lanes.store(pair, memory, first + column)
                else:
                    self.lanes.store([self.lanes.pack(*pair, kind)], memory, (first + column) // 2)

    def write(self, pairs: Sequence[Pair], gains: Sequence[Pair], out: Sequence[Memory]) -> list[Pair]:
        """Stores the stream, its inputs and its part of the sum of squares; returns the stream, padding as zeros."""
        lanes, stream, (memory, x, inputs, squares) = self.lanes, self.stream, out
        is_real, zero = self.token < self.scalars["count"], lanes.constant(0, F32)
        kept = [
            (lanes.select(is_real & exists, low, zero), lanes.select(is_real & exists, high, zero))
            for exists, (low, high) in zip(self.exist, pairs)
        ]
        self.keep(kept, memory)
        self.store(kept, x, self.token * stream.width, F32)
        is_read_by = {format: self.scalars["reader"].equals(number) for number, format in enumerate(FORMATS)}
        is_f16 = next(found for format, found in is_read_by.items() if INPUT_TYPE[format] == "f16")
        scale = lanes.constant(1.0, F32)
        for format, found in is_read_by.items():
            if INPUT_SHIFT[format]:
                scale = lanes.select(found, lanes.constant(2.0 ** INPUT_SHIFT[format], F32), scale)
        for exists, column, (low, high), (a, b) in zip(self.exist, self.columns, kept, gains):
            scaled = (low * a * scale, high * b * scale)
            word = lanes.select(is_f16, *(lanes.pack(*scaled, kind) for kind in ("f16", "bf16")))
            with lanes.when(exists):
                lanes.store([word], inputs, stream.inputs.place(self.token, column))
        total = lanes.sum_over(summed([value * value for pair in kept for value in pair]), THREADS)
        with lanes.when((lanes.thread % THREADS).equals(0)):
            lanes.store([total], squares, self.scalars["cta"] * stream.tokens + self.token)
        return kept


def _pair(lanes: Lanes, memory: Memory, index: Value) -> Pair:
    low, high = lanes.load(memory, index, F32, 2)
    return low, high
