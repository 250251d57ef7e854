"""Runs the rows of a target's step in float32 NumPy: what every kind of row has to compute, with nothing packed.

A row computes its share of its phase and no more, in buffers that hold NaN until then, so that a missing row, or one
that runs too early, shows. Claimed rows hand over whole buffers; assigned rows (of one device) the pages that they say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.decode_step.arithmetic import (
    Part,
    attend_part,
    merge_parts,
    multiply,
    normalise,
    rotate,
    sigmoid,
    swiglu,
)
from pallas_kernels.decode_step.geometry import Layer, Target
from pallas_kernels.decode_step.schedule import FEATURES_PER_UNIT, ROWS_PER_UNIT, Kind, Row

ROW_BLOCK = 16  # rows of a matrix that are one unit of a CTA's work
KEY_BLOCK = 32  # rows of a cache; blocks are dealt out in turn where several CTAs share the keys of a head
Weights = dict  # a tree of float32 arrays, named as the Flax modules name their parameters


@dataclasses.dataclass(frozen=True)
class KindCache:
    """Rotated keys and scaled values of all layers of one kind; S is the capacity, or the size of the ring."""

    keys: Float[np.ndarray, "L B K S Q"]
    values: Float[np.ndarray, "L B K S V"]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step returns. `aux_LBTD` is the residual stream after every layer."""

    logits_BTC: Float[np.ndarray, "B T C"]
    hidden_BTD: Float[np.ndarray, "B T D"]
    aux_LBTD: Float[np.ndarray, "L B T D"]
    expert_counts_LE: Int[np.ndarray, "L E"]
    picked_BT: Int[np.ndarray, "B T"]
    global_cache: KindCache
    sliding_cache: KindCache


def run(
    rows: list[Row],
    target: Target,
    weights: Weights,
    tokens_BT: Int[np.ndarray, "B T"],
    global_cache: KindCache,
    sliding_cache: KindCache,
    lengths_B: Int[np.ndarray, "B"],
    counts_B: Int[np.ndarray, "B"],
) -> Step:
    """Reads the first `counts_B` of T tokens after `lengths_B`. The caches are not changed, but returned anew."""
    caches = tuple(KindCache(cache.keys.copy(), cache.values.copy()) for cache in (global_cache, sliding_cache))
    step = _Step(target, weights, tokens_BT, caches, lengths_B, counts_B)
    with np.errstate(invalid="ignore", over="ignore"):  # padding may see no key at all
        for row in rows:
            _RUN[row.kind](step, row)
    shape = tokens_BT.shape
    return Step(
        logits_BTC=step.buffers["logits"].reshape(*shape, -1),
        hidden_BTD=step.normed.reshape(*shape, -1),
        aux_LBTD=step.aux_LTD.reshape(-1, *shape, target.width),
        expert_counts_LE=np.array(list(step.expert_counts.values())).reshape(-1, target.experts),
        picked_BT=step.buffers["picked"].reshape(shape).astype(np.int32),
        global_cache=caches[0],
        sliding_cache=caches[1],
    )


@dataclasses.dataclass(frozen=True)
class _Routes:
    """The experts that tokens chose, their weights, and which experts are active at all, ascending."""

    ids_TX: np.ndarray
    weights_TX: np.ndarray
    active: list[int]

    def choices(self, expert: int) -> list[tuple[int, int]]:
        """(token, choice) of those who chose an expert."""
        return [(int(token), int(choice)) for token, choice in np.argwhere(self.ids_TX == expert)]


class _Step:
    """Buffers of one step, and a method for each kind of row. T counts the tokens of all rows of the batch."""

    def __init__(self, target, weights, tokens_BT, caches, lengths_B, counts_B) -> None:
        self.target, self.weights, self.caches = target, weights, caches
        self.tokens_T, (self.batch, self.steps) = tokens_BT.reshape(-1), tokens_BT.shape
        self.lengths_B, self.counts_B = lengths_B, counts_B
        self.buffers: dict[str, np.ndarray] = {}
        self.phases: dict[str, tuple] = {}  # buffer -> the phase that is writing it
        self.pages: dict[tuple, np.ndarray] = {}  # of CTAs
        self.routes: dict[tuple, _Routes] = {}  # one for all, or each CTA's
        self.parts: dict[tuple, Part] = {}  # (query, part of the keys)
        self.candidates: dict[int, tuple[int, np.ndarray]] = {}  # CTA -> the first of its logits, and all of them
        self.normed = np.full((len(self.tokens_T), target.width), np.nan, np.float32)
        self.aux_LTD = np.full((len(target.layers), *self.normed.shape), np.nan, np.float32)
        self.expert_counts: dict[int, np.ndarray] = {}
        self.written: set[tuple[int, int, int]] = set()  # (layer, batch row, head) whose new keys are in the cache

    # What rows share.

    def _own(self, row: Row, units: int) -> range:
        """The units that are a row's share."""
        return range(units * row.share // row.shares, units * (row.share + 1) // row.shares)

    def _buffer(self, row: Row, name: str, *shape: int) -> np.ndarray:
        """What a row writes its share to: NaN for each phase anew."""
        if self.phases.get(name) != (row.kind, row.layer):
            self.phases[name] = row.kind, row.layer
            self.buffers[name] = np.full((len(self.tokens_T), *shape), np.nan, np.float32)
        return self.buffers[name]

    def _input(self, row: Row) -> np.ndarray:
        """The page, or else the buffer, that a row reads."""
        region = row.reads[0][0]
        return self.pages[region] if region[0] == "page" else self.buffers[region[0]]

    def _routes(self, row: Row) -> _Routes:
        return next(self.routes[region] for region, _ in row.reads if region[0] == "routes")

    def _layer(self, row: Row) -> tuple[Layer, Weights]:
        return self.target.layers[row.layer], self.weights[f"layers_{row.layer}"]

    def _rows(self, row: Row, outputs: int, per_unit: int = ROWS_PER_UNIT) -> slice:
        """Output rows of a matrix that are a row's share; a CTA shares finer."""
        per_unit = min(per_unit, ROW_BLOCK) if row.worker else per_unit
        own = self._own(row, -(-outputs // per_unit))
        return slice(own.start * per_unit, min(own.stop * per_unit, outputs))

    def _multiply(self, row: Row, name: str, weight_OI: np.ndarray) -> None:
        mine, out = self._rows(row, len(weight_OI)), self._buffer(row, name, len(weight_OI))
        out[:, mine] = multiply(self._input(row), weight_OI[mine])

    # The kinds.

    def nothing(self, row: Row) -> None:
        """Loads need no place here, and one device sends nothing."""

    def embed(self, row: Row) -> None:
        """By tokens; a CTA by columns, which it keeps and shows."""
        tokens, columns = self._part_of_stream(row)
        x_TD = self._buffer(row, "x", self.target.width)
        x_TD[tokens, columns] = self.weights["embed"][self.tokens_T][tokens, columns]
        if row.worker:
            self._show(row, columns)

    def _part_of_stream(self, row: Row) -> tuple[slice, slice]:
        if row.worker:
            return slice(None), self._rows(row, self.target.width)
        own = self._own(row, len(self.tokens_T))
        return slice(own.start, own.stop), slice(None)

    def reduce(self, row: Row) -> None:
        """Adds the part that the phase before left; an even norm comes after a layer."""
        mine = self._part_of_stream(row)
        self.buffers["x"][mine] += self.buffers["part"][mine]
        if row.layer % 2 == 0:
            self.aux_LTD[row.layer // 2 - 1][mine] = self.buffers["x"][mine]
        if row.worker:
            self._show(row, mine[1])

    def _show(self, row: Row, columns: slice) -> None:
        """What a CTA owns of the stream, for all: with its norm's gain, and beside it what all of it is divided by."""
        shown = self._buffer(row, "stream", self.target.width)
        shown[:, columns] = self.buffers["x"][:, columns]
        self.gain_D = self._gain(row.layer)

    def _gain(self, index: int) -> np.ndarray:
        if index == 2 * len(self.target.layers):
            return self.weights["norm"]["weight"]
        return self.weights[f"layers_{index // 2}"]["post_norm" if index % 2 else "input_norm"]["weight"]

    def fetch(self, row: Row) -> None:
        """A page; of the stream it is read normalised."""
        source, (page, _) = row.reads[0][0][0], row.writes[0]
        self.pages[page] = self.buffers[source].copy()
        if source == "stream":
            self.pages[page] = normalise(self.pages[page], self.gain_D, self.target.norm_eps)
            self.normed = self.pages[page] if row.of == Kind.HEAD else self.normed

    def norm(self, row: Row) -> None:
        if row.layer:
            self.reduce(row)
        mine = self._part_of_stream(row)
        normed = self._buffer(row, "normed", self.target.width)
        normed[mine] = normalise(self.buffers["x"][mine], self._gain(row.layer), self.target.norm_eps)
        if row.layer == 2 * len(self.target.layers):
            self.normed[mine] = normed[mine]

    def qkv(self, row: Row) -> None:
        held = self._layer(row)[1]["attention"]
        stacked = [held["qkv"]] if "qkv" in held else [held[name] for name in "qkv"]
        self._multiply(row, "qkv", np.concatenate([part.reshape(-1, self.target.width) for part in stacked]))

    def output(self, row: Row) -> None:
        self._multiply(row, "part", self._layer(row)[1]["attention"]["o"])

    def gate_up(self, row: Row) -> None:
        mlp = self._layer(row)[1]["mlp"]
        mine, x_TD = self._rows(row, len(mlp["gate"]), FEATURES_PER_UNIT), self._input(row)
        out = self._buffer(row, "hidden", len(mlp["gate"]))
        out[:, mine] = swiglu(x_TD, mlp["gate"][mine], mlp["up"][mine])

    def down(self, row: Row) -> None:
        self._multiply(row, "part", self._layer(row)[1]["mlp"]["down"])

    def router(self, row: Row) -> None:
        self._multiply(row, "scores", self._layer(row)[1]["moe"]["router"])

    def top_k(self, row: Row) -> None:
        """The bias only selects. Tokens that are padding choose no expert."""
        target, scores_TE = self.target, sigmoid(self._input(row))
        biased_TE = scores_TE + self._layer(row)[1]["moe"]["router_bias"]
        ids_TX = np.argsort(-biased_TE, axis=-1, kind="stable")[:, : target.chosen]
        picked_TX = np.take_along_axis(scores_TE, ids_TX, axis=-1)
        weights_TX = picked_TX / (np.sum(picked_TX, axis=-1, keepdims=True) + np.float32(1e-20))
        is_real_T = (np.arange(self.steps) < self.counts_B[:, None]).reshape(-1)
        ids_TX = np.where(is_real_T[:, None], ids_TX, target.experts)
        counts_E = np.bincount(ids_TX.reshape(-1), minlength=target.experts + 1)[:-1]
        self.expert_counts[row.layer] = counts_E
        self.routes[row.writes[0][0]] = _Routes(ids_TX, weights_TX, np.flatnonzero(counts_E).tolist())

    def expert_gate_up(self, row: Row) -> None:
        """A unit is 32 features of an active expert, for all tokens that chose it."""
        moe, routes, x_TD = self._layer(row)[1]["moe"], self._routes(row), self._input(row)
        features, per_unit = self.target.expert_features, FEATURES_PER_UNIT
        hidden_TXF = self._buffer(row, "hidden", self.target.chosen, features)
        per_expert = -(-features // per_unit)
        for unit in self._own(row, len(routes.active) * per_expert):
            expert, block = routes.active[unit // per_expert], unit % per_expert
            mine = slice(block * per_unit, min((block + 1) * per_unit, features))
            for token, choice in routes.choices(expert):
                x_1D = x_TD[token : token + 1]
                hidden_TXF[token, choice, mine] = swiglu(x_1D, moe["gate"][expert, mine], moe["up"][expert, mine])[0]

    def expert_down(self, row: Row) -> None:
        """A unit is 32 columns of the stream; experts add to them in ascending order."""
        moe, routes, hidden_TXF = self._layer(row)[1]["moe"], self._routes(row), self._input(row)
        mine, out = self._rows(row, self.target.width), self._buffer(row, "part", self.target.width)
        out[:, mine] = 0
        for expert in routes.active:
            for token, choice in routes.choices(expert):
                product_O = multiply(hidden_TXF[token, choice][None], moe["down"][expert, mine])[0]
                out[token, mine] += routes.weights_TX[token, choice] * product_O

    def head(self, row: Row) -> None:
        self._multiply(row, "logits", self.weights["head"])

    def pick(self, row: Row) -> None:
        """By tokens; a CTA among the logits that it made."""
        if row.worker:
            logits_TC = self._input(row)
            mine = self._rows(row, logits_TC.shape[1])
            self.candidates[row.share] = mine.start, logits_TC[:, mine]
            return
        picked_T = self._buffer(row, "picked")
        for token in self._own(row, len(self.tokens_T)):
            picked_T[token] = np.argmax(self._input(row)[token])

    def pick_best(self, row: Row) -> None:
        """The first of the largest, CTA after CTA."""
        parts = [self.candidates[share] for share in sorted(self.candidates) if self.candidates[share][1].size]
        best_TP = np.stack([np.max(logits_TC, axis=-1) for _, logits_TC in parts], axis=-1)
        picked_T = self._buffer(row, "picked")
        for token, part in enumerate(np.argmax(best_TP, axis=-1)):
            start, logits_TC = parts[part]
            picked_T[token] = start + np.argmax(logits_TC[token])

    # Attention.

    def attend(self, row: Row) -> None:
        """By heads of keys, or of queries, once keys are written. CTAs: by query heads and tokens, or on global layers
        by heads and blocks of keys."""
        layer, _ = self._layer(row)
        heads = self.batch * self.target.kv_heads(layer)
        each = self.target.heads // self.target.kv_heads(layer) * self.steps
        if row.worker and not layer.is_sliding:
            parts = max(1, row.shares // heads)
            for unit in self._own(row, heads * parts):
                for query in range(unit // parts * each, (unit // parts + 1) * each):
                    self.parts[query, unit % parts] = self._attend_part(row, query, unit % parts, parts)
            return
        size = 1 if row.worker else self.steps if row.kind == Kind.QUERIES else each  # queries of a unit
        units = self._own(row, heads * each // size)
        for query in range(units.start * size, units.stop * size):
            self._finish(row, query, [self._attend_part(row, query, 0, 1)])

    def keys(self, row: Row) -> None:
        kv_heads = self.target.kv_heads(self._layer(row)[0])
        for unit in self._own(row, self.batch * kv_heads):
            self._updated(row, unit // kv_heads, unit % kv_heads)
        self._buffer(row, "keys")

    def merge(self, row: Row) -> None:
        count = 1 + max(part for _, part in self.parts)
        for query in self._own(row, len(self.tokens_T) * self.target.heads):
            self._finish(row, query, [self.parts.pop((query, part)) for part in range(count)])

    def _finish(self, row: Row, query: int, parts: list[Part]) -> None:
        layer, held = self._layer(row)
        token, head, _ = self._query(layer, query)
        sink_H = held["attention"].get("sink")
        dim = self.target.value_dim
        out = self._buffer(row, "attended", self.target.heads * dim)
        out[token, head * dim : (head + 1) * dim] = merge_parts(parts, None if sink_H is None else sink_H[head])

    def _query(self, layer: Layer, query: int) -> tuple[int, int, int]:
        """Token, query head and key/value head of a query; tokens run fastest, then heads, then batch rows."""
        rest, step = divmod(query, self.steps)
        batch, head = divmod(rest, self.target.heads)
        return batch * self.steps + step, head, head // (self.target.heads // self.target.kv_heads(layer))

    def _attend_part(self, row: Row, query: int, part: int, parts: int) -> Part:
        layer, _ = self._layer(row)
        token, head, kv_head = self._query(layer, query)
        batch, step = divmod(token, self.steps)
        keys_SQ, values_SV = self._updated(row, batch, kv_head)
        q_Q = self._rotated(layer, self._heads(row, token)[0][head], token)
        visible_S = self._visible(layer, batch, step, len(keys_SQ))
        mine_S = np.arange(len(keys_SQ)) // KEY_BLOCK % parts == part
        return attend_part(q_Q, keys_SQ, values_SV, visible_S & mine_S)

    def _heads(self, row: Row, token: int) -> tuple[np.ndarray, ...]:
        """Queries, keys and values of a token: the rows of each chunk are some heads of each."""
        target, (layer, _) = self.target, self._layer(row)
        kv_heads = target.kv_heads(layer)
        sizes = (target.heads * target.head_dim, kv_heads * target.head_dim, kv_heads * target.value_dim)
        starts = np.cumsum([size // target.chunks for size in sizes])[:-1]
        q, k, v = np.split(self._input(row)[token].reshape(target.chunks, -1), starts, axis=-1)
        dims = (target.head_dim, target.head_dim, target.value_dim)
        return tuple(part.reshape(-1, dim) for part, dim in zip((q, k, v), dims))

    def _rotated(self, layer: Layer, x: np.ndarray, token: int) -> np.ndarray:
        batch, step = divmod(token, self.steps)
        theta = self.target.sliding_theta if layer.is_sliding else self.target.global_theta
        return rotate(x, int(self.lengths_B[batch]) + step, self.target.rotary, theta)

    def _updated(self, row: Row, batch: int, kv_head: int) -> tuple[np.ndarray, np.ndarray]:
        """A head's keys and values, the new tokens' among them: written by whoever comes first, or by rows before."""
        layer, index = self._layer(row)[0], self.target.index_of_kind(row.layer)
        cache = self.caches[layer.is_sliding]
        keys_SQ, values_SV = cache.keys[index, batch, kv_head], cache.values[index, batch, kv_head]
        if (row.layer, batch, kv_head) in self.written or row.kind == Kind.QUERIES:
            return keys_SQ, values_SV
        self.written.add((row.layer, batch, kv_head))
        for step in range(self.counts_B[batch]):
            token, place = batch * self.steps + step, (int(self.lengths_B[batch]) + step) % len(keys_SQ)
            _, keys_KQ, values_KV = self._heads(row, token)
            keys_SQ[place] = self._rotated(layer, keys_KQ[kv_head], token)
            values_SV[place] = values_KV[kv_head] * np.float32(self.target.value_scale)
        return keys_SQ, values_SV

    def _visible(self, layer: Layer, batch: int, step: int, size: int) -> np.ndarray:
        """Which rows of the cache, after the update, hold positions that a query sees."""
        last, query = int(self.lengths_B[batch] + self.counts_B[batch]) - 1, int(self.lengths_B[batch]) + step
        row_S = np.arange(size)
        if not layer.is_sliding:
            return row_S <= min(last, query)
        position_S = last - (last - row_S) % size
        return (position_S >= 0) & (position_S <= query) & (position_S > query - self.target.window)


_RUN: dict[Kind, Callable[[_Step, Row], None]] = {
    Kind.NOTHING: _Step.nothing,
    Kind.EMBED: _Step.embed,
    Kind.NORM: _Step.norm,
    Kind.QKV: _Step.qkv,
    Kind.ATTEND: _Step.attend,
    Kind.KEYS: _Step.keys,
    Kind.QUERIES: _Step.attend,
    Kind.OUTPUT: _Step.output,
    Kind.GATE_UP: _Step.gate_up,
    Kind.DOWN: _Step.down,
    Kind.ROUTER: _Step.router,
    Kind.TOP_K: _Step.top_k,
    Kind.EXPERT_GATE_UP: _Step.expert_gate_up,
    Kind.EXPERT_DOWN: _Step.expert_down,
    Kind.HEAD: _Step.head,
    Kind.PICK: _Step.pick,
    Kind.PICK_BEST: _Step.pick_best,
    Kind.FETCH: _Step.fetch,
    Kind.LOAD: _Step.nothing,
    Kind.REDUCE: _Step.reduce,
    Kind.MERGE: _Step.merge,
}
