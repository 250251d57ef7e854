"""From logits to a token: the largest, and of equal ones the first."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pallas_kernels.decode_step.hopper.products import Tile
from pallas_kernels.lanes import Lanes, Memory, Value
from pallas_kernels.lanes.values import I32

LEAST = -(2**31)  # of all keys
THREADS = 8  # of a token, where the largest logit is sought
UNROLL = 4


def ordered_key(lanes: Lanes, value: Value) -> Value:
    """An integer that is ordered as floats are."""
    return _flip(lanes, value.as_int())


def pick_part(vocab: int, tokens: int) -> Tile:
    """Each token's largest logit among the CTA's, and the first index that has it.

    Memories: logits float32 [tokens, vocab]; candidates int32 [ctas, 2, tokens], keys of logits and their indices; a
    CTA without logits leaves what loses against any. Scalars: cta; first, last, of the CTA's logits and after them.
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        logits, candidates = memories
        token, part = lanes.thread // THREADS, lanes.thread % THREADS
        with lanes.when(token < tokens):

            def step(first: Value, key: Value, index: Value) -> tuple[Value, Value]:
                # An index beyond the end is taken for the last one, which is no error: the largest stays the largest.
                found = [(part + first + i * THREADS).minimum(scalars["last"] - 1) for i in range(UNROLL)]
                values = [lanes.load_one(logits, token * vocab + own) for own in found]
                for own, value in zip(found, values):
                    key, index = _larger(lanes, (key, index), (ordered_key(lanes, value + 0.0), own))
                return key, index

            nothing = lanes.constant(LEAST, I32), lanes.constant(2**31 - 1, I32)
            best = lanes.loop(scalars["first"], scalars["last"], THREADS * UNROLL, step, nothing)
            best = _largest_of_token(lanes, best)
            with lanes.when(part.equals(0)):
                for which, value in enumerate(best):
                    lanes.store([value], candidates, (scalars["cta"] * 2 + which) * tokens + token)

    return tile


def pick_all(ctas: int, tokens: int) -> Tile:
    """Each token's largest logit of all CTAs' candidates.

    Devices that share a vocabulary would merge theirs in the same way, with indices counted from the first shard's.

    Memories: candidates as in `pick_part`; best int32 [tokens]; values float32 [tokens].
    """

    def tile(lanes: Lanes, memories: Sequence[Memory], scalars: dict[str, Value]) -> None:
        candidates, best, values = memories
        token, part = lanes.thread // THREADS, lanes.thread % THREADS
        with lanes.when(token < tokens):
            rows = [(part + first).minimum(ctas - 1) * (2 * tokens) + token for first in range(0, ctas, THREADS)]
            loaded = [[lanes.load_one(candidates, row + which * tokens, I32) for which in range(2)] for row in rows]
            key, index = _largest_of_token(lanes, functools.reduce(functools.partial(_larger, lanes), loaded))
            with lanes.when(part.equals(0)):
                lanes.store([index], best, token)
                lanes.store([_flip(lanes, key).as_float()], values, token)

    return tile


def _flip(lanes: Lanes, bits: Value) -> Value:
    """Between a float's bits and an integer that is ordered as floats are, -0 before 0; the same both ways."""
    return lanes.select(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _larger(lanes: Lanes, a: Sequence[Value], b: Sequence[Value]) -> tuple[Value, Value]:
    """Of two (key, index), that of the larger key, or of the lesser index."""
    is_b = (b[0] > a[0]) | (b[0].equals(a[0]) & (b[1] < a[1]))
    return lanes.select(is_b, b[0], a[0]), lanes.select(is_b, b[1], a[1])


def _largest_of_token(lanes: Lanes, best: Sequence[Value]) -> tuple[Value, Value]:
    by = THREADS // 2
    while by:
        best, by = _larger(lanes, best, [lanes.shuffle(value, by) for value in best]), by // 2
    return best[0], best[1]
