"""A round as a table of work: config and mesh -> phases -> rows.

A phase is one operation of the round (the QKV projection of layer 3). Its units can be computed in any order, and a
row does a share of them. Every device and granularity has the same phases; what differs is how they are split into
rows, who runs a row, and what it waits for.

Rows lie in an order that is a linear extension of their dependencies: threads that claim them one after the other
never wait for a row that nobody has claimed.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable

import numpy as np

from pallas_kernels.decode_step.geometry import Drafter, Target


class Kind(enum.IntEnum):
    """What a row does. Native code is compiled with these numbers."""

    NOTHING = 0
    # Target.
    EMBED = 1
    NORM = 2  # adds what the phase before left to the residual stream, and normalises the sum
    QKV = 3
    ATTEND = 4  # rotates, writes keys and values into the cache, attends
    OUTPUT = 5
    GATE_UP = 6
    DOWN = 7
    ROUTER = 8
    TOP_K = 9  # also lists which experts are active, and their tokens
    EXPERT_GATE_UP = 10
    EXPERT_DOWN = 11
    HEAD = 12
    PICK = 13  # the largest logits
    # Drafter: its own embedding, attention and end; between them the target's kinds serve.
    LOOK_UP = 14
    GUESS = 15
    DRAFT_EMBED = 16
    DRAFT_ATTEND = 17
    BIAS = 18
    DRAFT_PICK = 19
    # What the target has read, as keys and values of the drafter.
    TAKE = 20
    FUSE = 21
    CONTEXT = 22
    CONTEXT_WRITE = 23
    # Only where cores share the work of a GPU, or devices that of a model.
    FETCH = 24
    LOAD = 25
    SEND = 26
    REDUCE = 27
    MERGE = 28
    PICK_BEST = 29  # the largest of what all CTAs picked
    # ATTEND in two phases, where there are fewer heads of keys than threads could share.
    KEYS = 30
    QUERIES = 31


@dataclasses.dataclass(frozen=True)
class Phase:
    """One operation of a round: which buffers it reads whole, and which one its units write together."""

    kind: Kind
    layer: int
    units: int  # into so many shares it can be split, at most
    reads: tuple[str, ...]
    writes: str
    weights: int = 0  # that it reads
    products: int = 0  # multiply-adds
    updates: str = ""  # a buffer of which every unit reads and replaces its own part
    queries: int = 0  # of an attention: pairs of a query head and a token
    query_heads: int = 0  # of all rows of the batch
    is_global: bool = False  # an attention to all keys, which can be split by them


ROWS_PER_UNIT = 32  # output rows of a matrix that are one unit of work
FEATURES_PER_UNIT = 32  # of a gated FFN; each has a row of the gate's projection and one of the up projection


def _matmul(kind: Kind, layer: int, shape: tuple[int, int], tokens: int, reads: tuple[str, ...], writes: str) -> Phase:
    weights = math.prod(shape)
    return Phase(kind, layer, math.ceil(shape[0] / ROWS_PER_UNIT), reads, writes, weights, weights * tokens)


def step_phases(target: Target, tokens: int, batch: int = 1) -> list[Phase]:
    """The target reads `tokens` tokens of each of `batch` rows."""
    read, width = tokens * batch, target.width
    phases = [Phase(Kind.EMBED, 0, read, (), "x")]
    for index, layer in enumerate(target.layers):
        outputs = target.heads * target.value_dim
        phases += [
            _norm(2 * index, read),
            _matmul(Kind.QKV, index, (target.qkv_rows(layer), width), read, ("normed",), "qkv"),
            _attention(target, index, tokens, batch),
            _matmul(Kind.OUTPUT, index, (width, outputs), read, ("attended",), "part"),
            _norm(2 * index + 1, read),
            *(_experts(target, index, read) if layer.has_experts else _dense(index, target.features, width, read)),
        ]
    return phases + [
        _norm(2 * len(target.layers), read),
        _matmul(Kind.HEAD, 0, (target.vocab, width), read, ("normed",), "logits"),
        Phase(Kind.PICK, 0, read, ("logits",), "picked"),
    ]


def _norm(number: int, read: int) -> Phase:
    return Phase(Kind.NORM, number, read, ("part",), "normed", updates="x")


def _attention(target: Target, index: int, tokens: int, batch: int) -> Phase:
    layer = target.layers[index]
    units, heads = batch * target.kv_heads(layer), batch * target.heads
    whole = Phase(Kind.ATTEND, index, units, ("qkv",), "attended", is_global=not layer.is_sliding)
    return dataclasses.replace(whole, queries=heads * tokens, query_heads=heads)


def _dense(index: int, features: int, width: int, read: int) -> list[Phase]:
    units, weights = math.ceil(features / FEATURES_PER_UNIT), 2 * features * width
    return [
        Phase(Kind.GATE_UP, index, units, ("normed",), "hidden", weights, weights * read),
        _matmul(Kind.DOWN, index, (width, features), read, ("hidden",), "part"),
    ]


def _experts(target: Target, index: int, read: int) -> list[Phase]:
    """Which experts are active is known when it runs: rows share whatever they are. Here all tokens choose others."""
    pairs, features, cols = read * target.chosen, target.expert_features, target.width
    active = min(target.experts, pairs)

    def stack(kind: Kind, units: int, shape: tuple[int, int], reads: tuple[str, ...], writes: str) -> Phase:
        return Phase(kind, index, units, reads, writes, active * math.prod(shape), pairs * math.prod(shape))

    units, columns = math.ceil(features / FEATURES_PER_UNIT), math.ceil(cols / ROWS_PER_UNIT)
    return [
        _matmul(Kind.ROUTER, index, (target.experts, cols), read, ("normed",), "scores"),
        Phase(Kind.TOP_K, index, 1, ("scores",), "routes"),
        stack(Kind.EXPERT_GATE_UP, active * units, (2 * features, cols), ("normed", "routes"), "hidden"),
        stack(Kind.EXPERT_DOWN, columns, (cols, features), ("hidden", "routes"), "part"),
    ]


def draft_phases(drafter: Drafter, batch: int = 1, is_greedy: bool = True) -> list[Phase]:
    """The drafter fills a block of each row.

    `is_greedy`: it also picks the most likely tokens, one after the other where there is a bias, whose rows pick the
    token before, too.
    """
    width, read = drafter.width, drafter.block * batch
    phases = []
    if drafter.lookup:
        phases += [
            Phase(Kind.LOOK_UP, 0, batch, (), "guesses"),
            _matmul(Kind.GUESS, 0, (width, width), read, ("guesses",), "guessed"),
        ]
    phases.append(Phase(Kind.DRAFT_EMBED, 0, read, ("guessed",) if drafter.lookup else (), "x"))
    for index in range(drafter.num_layers):
        outputs = drafter.heads * drafter.head_dim
        phases += [
            _norm(2 * index, read),
            _matmul(Kind.QKV, index, (drafter.qkv_rows, width), read, ("normed",), "qkv"),
            Phase(Kind.DRAFT_ATTEND, index, batch * drafter.kv_heads, ("qkv",), "attended"),
            _matmul(Kind.OUTPUT, index, (width, outputs), read, ("attended",), "part"),
            _norm(2 * index + 1, read),
            *_dense(index, drafter.features, width, read),
        ]
    phases += [
        _norm(2 * drafter.num_layers, read),
        _matmul(Kind.HEAD, 0, (drafter.target_vocab, width), read, ("normed",), "logits"),
    ]
    if is_greedy:
        read_before = ("logits",)
        for draft in range(1, drafter.block) if drafter.bias_rank else ():
            shape = (drafter.vocab, drafter.bias_rank)
            phases.append(_matmul(Kind.BIAS, draft, shape, batch, read_before, f"biased {draft}"))
            read_before = ("logits", f"biased {draft}")
        phases.append(Phase(Kind.DRAFT_PICK, 0, 1, read_before, "picked"))
    return phases


def context_phases(drafter: Drafter, tokens: int, batch: int = 1) -> list[Phase]:
    """What the target has read becomes keys and values of the drafter."""
    rows, width, read = 2 * drafter.kv_heads * drafter.head_dim, drafter.width, tokens * batch
    return [
        Phase(Kind.TAKE, 0, read, (), "aux"),
        _matmul(Kind.FUSE, 0, (width, len(drafter.aux_layers) * width), read, ("aux",), "x"),
        Phase(Kind.NORM, 0, read, ("x",), "normed"),
        _matmul(Kind.CONTEXT, 0, (drafter.num_layers * rows, width), read, ("normed",), "qkv"),
        Phase(Kind.CONTEXT_WRITE, 0, drafter.num_layers * drafter.kv_heads, ("qkv",), "context"),
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A share of a phase, which some worker does in one go.

    It starts when each counter of `waits` has reached its value, and adds one to each counter of `signals`. `reads`
    and `writes` name (region, version): the validator knows what a region must hold.
    """

    kind: Kind
    layer: int
    share: int
    shares: int
    waits: tuple[tuple[int, int], ...] = ()  # (counter, value)
    signals: tuple[int, ...] = ()
    reads: tuple[tuple[tuple, int], ...] = ()
    writes: tuple[tuple[tuple, int], ...] = ()
    worker: tuple = ()  # (device, CTA, role); () is whoever claims it
    of: Kind = Kind.NOTHING  # for which phase a copy is made
    weights: int = 0  # that it reads
    products: int = 0
    fences_in: bool = False  # a proxy fence after its waits
    fences_out: bool = False  # and one before its signals


COPIES = (Kind.FETCH, Kind.LOAD, Kind.SEND)  # asynchronous, in bulk: to the memory model a proxy of their own
ROW_PRODUCTS = 1 << 14  # of one row: about a microsecond of a core
MOST_SHARES = 16
SHARES_PER_CORE = 4  # of a product, unless a prompt is read: then a share is long, and more of them even out
PROMPT = 16  # more tokens than these are a prompt's
TOKEN_SHARES = 2  # of work that is split by tokens
FEW_HEADS = 8  # fewer heads of keys than these are shared by query heads


def shares_of(phase: Phase, cores: int = MOST_SHARES) -> int:
    """Into how many rows threads split a phase: enough to even out, few enough that claiming them costs nothing."""
    if phase.products:
        most = MOST_SHARES if phase.products > PROMPT * phase.weights else min(MOST_SHARES, SHARES_PER_CORE * cores)
        most = max(1, min(phase.units, most, phase.products // ROW_PRODUCTS))
        each = math.ceil(phase.units / most)
        return math.ceil(phase.units / (each if each == 1 else 2 * math.ceil(each / 2)))  # a token's tile: two units
    by_heads = (Kind.ATTEND, Kind.QUERIES, Kind.DRAFT_ATTEND, Kind.CONTEXT_WRITE)
    return min(phase.units, MOST_SHARES if phase.kind in by_heads else TOKEN_SHARES)


def _for_threads(phases: Iterable[Phase]) -> Iterable[Phase]:
    """Where heads of keys are few, a phase writes their keys, and then heads of queries attend, which are more."""
    for phase in phases:
        if phase.kind == Kind.ATTEND and phase.units < min(FEW_HEADS, phase.query_heads):
            yield dataclasses.replace(phase, kind=Kind.KEYS, writes="keys")
            yield dataclasses.replace(phase, kind=Kind.QUERIES, units=phase.query_heads, reads=("qkv", "keys"))
        else:
            yield phase


def claimed_rows(phases: Iterable[Phase], cores: int = MOST_SHARES) -> list[Row]:
    """Rows for threads on so many cores, which claim them in this order: a phase begins when the one before it is
    complete.
    """
    rows: list[Row] = []
    held: dict[str, tuple[int, int]] = {}  # buffer -> its version, and the shares it was written in
    before = 0
    for number, phase in enumerate(_for_threads(phases)):
        shares = shares_of(phase, cores)
        waits = ((number - 1, before),) if number else ()
        reads = tuple(
            ((buffer, piece), held[buffer][0])
            for buffer in phase.reads
            if buffer in held  # before the first layer there is nothing to be added
            for piece in range(held[buffer][1])
        )
        version = held.get(phase.writes, (0, 0))[0] + 1
        held[phase.writes] = (version, shares)
        updated = held.get(phase.updates, (0, shares))[0]
        if phase.updates:
            held[phase.updates] = (updated + 1, shares)
        for share in range(shares):
            access, writes = reads, (((phase.writes, share), version),)  # one object where all shares read the same
            if phase.updates:
                access = (*reads, ((phase.updates, share), updated))
                writes = (*writes, ((phase.updates, share), updated + 1))
            work = {"weights": phase.weights // shares, "products": phase.products // shares}
            rows.append(Row(phase.kind, phase.layer, share, shares, waits, (number,), access, writes, **work))
        before = shares
    return rows


COLUMNS = ("kind", "layer", "share", "shares", "wait", "value", "signal")  # of what native code reads


def encode(rows: list[Row]) -> np.ndarray:
    """Rows of threads as int32 [rows, 7], see `COLUMNS`; -1 for no counter to wait for."""
    table = np.zeros((len(rows), len(COLUMNS)), np.int32)
    for place, row in enumerate(rows):
        counter, value = row.waits[0] if row.waits else (-1, 0)
        table[place] = row.kind, row.layer, row.share, row.shares, counter, value, row.signals[0]
    return table
