"""What one kernel is compiled for: a device's share of a model, so many tokens, and where everything lies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pallas_kernels.decode_step.assigned import CTAS
from pallas_kernels.decode_step.geometry import Target
from pallas_kernels.decode_step.hopper.attention import KEYS, Attention
from pallas_kernels.decode_step.hopper.config import (
    COLUMN_UNIT,
    CONSUMERS,
    LINE_WORDS,
    OWN_COLUMNS,
    PAGE_GAP,
    ROWS,
    SLOT_WORDS,
    WARPS,
    Down,
    Inputs,
    Matrix,
    padded,
)
from pallas_kernels.decode_step.hopper.roles import MAX_BARRIERS
from pallas_kernels.decode_step.hopper.routing import Router, list_scratch
from pallas_kernels.decode_step.hopper.stream import Stream
from pallas_kernels.decode_step.schedule import Kind
from pallas_kernels.hardware import GPUS

BARRIER_BYTES = 4096  # of shared memory, kept free: also for buffers that begin at multiples of 1024
SHARED_BYTES = GPUS["h200"].shared_memory_per_block - BARRIER_BYTES
EXPERT_LINE = 256  # features of an expert's down whose bytes are whole lines, which single copies need
PAGE_PARTS = 3  # of an input that shared memory holds at a time
MOST_TOKENS = 8  # N of the tensor core's instruction; 16 would leave the ring no room beside their pages and sums
MOST_SLOTS = MAX_BARRIERS // CONSUMERS  # each has a barrier for each warpgroup


WIDENING = (Kind.QKV, Kind.GATE_UP)  # products that share their code

# How MiMo-V2.5-Pro's files store what a kind of product multiplies.
PUBLISHED = {
    Kind.QKV: "fp8",
    Kind.OUTPUT: "bf16",
    Kind.GATE_UP: "fp8",
    Kind.DOWN: "fp8",
    Kind.EXPERT_GATE_UP: "mxfp4",
    Kind.HEAD: "bf16",
}


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A step of 1 to 8 tokens of one row. `target` is one device's share, see `assigned.shard_of`.

    `formats` says how the weights of a kind of product are stored. `aux_layers` name the layers whose stream is shown.
    """

    target: Target
    formats: Mapping[Kind, str]
    tokens: int
    capacity: int  # rows of a global layer's cache
    aux_layers: tuple[int, ...] = ()
    has_sinks: tuple[bool, bool] = (False, True)  # of global and of sliding layers
    devices: int = 1
    ctas: int = CTAS

    def unsupported(self) -> str | None:
        """What keeps the kernel from serving this plan, by name and value."""
        t = self.target
        wide = -(-t.width // ROWS // self.ctas)
        rules = (
            (not 1 <= self.tokens <= MOST_TOKENS, f"tokens={self.tokens} must be 1 to {MOST_TOKENS}"),
            (t.width % ROWS, f"hidden_size={t.width} must be a multiple of {ROWS}"),
            (wide * ROWS > OWN_COLUMNS, f"hidden_size={t.width} is more than {OWN_COLUMNS} columns for each CTA"),
            (t.head_dim % 2 or t.value_dim % 2, f"head_dim={t.head_dim} and v_head_dim={t.value_dim} must be even"),
            (t.rotary % 4, f"{t.rotary} rotated dimensions must be a multiple of 4"),
            *self._unsupported_experts(),
            (self.slots < CONSUMERS, f"pages and sums leave shared memory for {self.slots} slots of the ring"),
        )
        return next((reason for is_broken, reason in rules if is_broken), None)

    def _unsupported_experts(self) -> list[tuple[bool, str]]:
        if Kind.EXPERT_GATE_UP not in self.formats:
            return []
        features, stored = self.target.expert_features, self.formats[Kind.EXPERT_GATE_UP]
        dense = self.formats.get(Kind.GATE_UP, self.formats[Kind.QKV])
        return [
            (stored != "mxfp4", f"experts are stored in {stored}, not in MXFP4"),
            (
                features % EXPERT_LINE != 0,
                f"an expert's {features} features on a device must be a multiple of {EXPERT_LINE}",
            ),
            (dense != self.formats[Kind.QKV], f"QKV is stored in {self.formats[Kind.QKV]}, gate and up in {dense}"),
            (
                self.router.slot_words > SLOT_WORDS,
                f"{self.target.experts} experts are {self.router.rows} for each CTA, more than a slot has room for",
            ),
        ]

    # Sizes that follow.

    @property
    def columns(self) -> int:
        """Tokens, padded."""
        return MOST_TOKENS

    @property
    def qkv_rows(self) -> int:
        """Of the kind of layer that has more."""
        return max(self.target.qkv_rows(layer) for layer in self.target.layers)

    @property
    def most_active(self) -> int:
        """Experts that tokens can choose."""
        return min(self.target.experts, self.tokens * self.target.chosen)

    @property
    def most_listed(self) -> int:
        """Experts that lists have room for: padding has its choices too, though it makes none."""
        return min(self.target.experts, self.pairs)

    @property
    def pairs(self) -> int:
        """Rows of what experts hand on: a token's choices side by side."""
        return self.columns * self.target.chosen

    def matrix(self, kind: Kind) -> Matrix:
        """That of a product's rows; EXPERT_DOWN and ROUTER have layouts of their own."""
        t = self.target
        rows, cols = {
            Kind.QKV: (self.qkv_rows, t.width),
            Kind.OUTPUT: (t.width, t.heads * t.value_dim),
            Kind.GATE_UP: (2 * t.features, t.width),
            Kind.DOWN: (t.width, t.features),
            Kind.EXPERT_GATE_UP: (2 * t.expert_features, t.width),
            Kind.HEAD: (t.vocab, t.width),
        }[kind]
        return Matrix(rows, padded(cols, COLUMN_UNIT), self.formats[kind])

    def inputs(self, kind: Kind) -> Inputs:
        """Of a product's rows."""
        return Inputs(self.matrix(kind).columns, self.columns)

    @property
    def products(self) -> tuple[Kind, ...]:
        """Kinds that multiply row blocks of a `Matrix`."""
        has = {layer.has_experts for layer in self.target.layers}
        dense = (Kind.GATE_UP, Kind.DOWN) if False in has else ()
        return (Kind.QKV, Kind.OUTPUT, *dense, *((Kind.EXPERT_GATE_UP,) if True in has else ()), Kind.HEAD)

    @property
    def down(self) -> Down:
        return Down(self.target.expert_features, -(-self.target.width // ROWS // self.ctas))

    def items(self, kind: Kind) -> int:
        """The most row blocks that are a CTA's share."""
        blocks = self.matrix(kind).row_blocks * (self.most_active if kind == Kind.EXPERT_GATE_UP else 1)
        return math.ceil(blocks / self.ctas)

    def ways(self, kind: Kind) -> int:
        """Teams that share a row block, a chunk each in turn: all of them where a CTA has few row blocks.

        How many experts are active, and so how many row blocks there are, depends on the tokens, but their sums must
        not: a warp's parts are added up before the next warp's, and with a chunk for each team that changes no bit.
        """
        alike = WIDENING if kind in WIDENING else (kind,)
        few = all(self.items(other) <= CONSUMERS for other in alike if other in self.products)
        chunks = self.matrix(kind).columns.chunks
        if not few or (kind == Kind.EXPERT_GATE_UP and chunks > CONSUMERS):
            return 1
        return min(CONSUMERS, chunks)

    # Shared memory, in words.

    @property
    def page_words(self) -> int:
        """Of a part of an input."""
        return max(self.inputs(kind).part_words for kind in self.products)

    @property
    def page_area(self) -> int:
        """Parts of an input, or the hidden rows of all pairs; whole lines."""
        return PAGE_PARTS * padded(max(self.page_words, self.hidden_part), LINE_WORDS)

    @property
    def area_words(self) -> int:
        """Pages and sums, or what attention needs instead."""
        return max(self.page_area + self.sum_words, self.attention_words)

    @property
    def hidden_stride(self) -> int:
        """Words of a row of what experts hand on."""
        return self.target.expert_features // 2 + PAGE_GAP

    @property
    def hidden_part(self) -> int:
        """Words of a page's share of what experts hand on: of all pairs' rows, whole lines."""
        return padded(-(-self.tokens * self.target.chosen * self.hidden_stride // PAGE_PARTS), LINE_WORDS)

    def hidden_place(self, row: Any, feature: Any) -> Any:
        """The word of two features of what experts hand on."""
        return row * self.hidden_stride + feature // 2

    def attention(self, is_sliding: bool) -> Attention:
        """One kind of layer."""
        t = self.target
        ring = padded(t.window - 1 + MOST_TOKENS, KEYS)
        config = Attention(
            tokens=self.tokens,
            heads=t.heads,
            kv_heads=t.sliding_kv_heads if is_sliding else t.global_kv_heads,
            chunks=t.chunks,
            head_dim=t.head_dim,
            value_dim=t.value_dim,
            rotary=t.rotary,
            cache_rows=ring if is_sliding else padded(self.capacity, KEYS),
            positions=self.capacity,
            window=t.window if is_sliding else None,
            value_scale=t.value_scale,
            has_sink=self.has_sinks[is_sliding],
            qkv_stride=self.qkv_rows,
            attended=self.inputs(Kind.OUTPUT),
        )
        # Half of Pro's outputs leave registers for the rest of the kernel; a single tile has all warps.
        most = WARPS if is_sliding or config.tiles == 1 else 2
        split = next(ways for ways in (4, 2, 1) if ways <= most and config.value_cols % (ROWS * ways) == 0)
        return dataclasses.replace(config, split=split)

    @property
    def vocab_rows(self) -> int:
        """Of the embedding, which is whole on each device."""
        return self.target.vocab * self.devices

    @property
    def own_words(self) -> int:
        """Of a CTA's sums for the columns that it owns."""
        return self.columns * OWN_COLUMNS

    @property
    def key_parts(self) -> int:
        """CTAs that share the keys of a global layer's head."""
        return max(1, self.ctas // self.target.global_kv_heads)

    @property
    def partial_words(self) -> int:
        """Parts of a global layer's attention."""
        config = self.attention(False)
        return config.kv_heads * self.key_parts * self.blocks_at_once * config.tiles * ROWS * config.part_stride

    @property
    def query_groups(self) -> int:
        """Warpgroups that a global layer's queries of a head keep busy with one block of keys."""
        config = self.attention(False)
        return next(groups for groups in (1, 2, 4) if groups * WARPS >= config.tiles * config.split)

    @property
    def blocks_at_once(self) -> int:
        """Blocks of keys that a CTA attends to at a time on a global layer."""
        return CONSUMERS // self.query_groups

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Whether there are global layers, and sliding ones: False, True."""
        return tuple(sorted({layer.is_sliding for layer in self.target.layers}))

    @property
    def attention_words(self) -> int:
        """Queries, new keys, new values; on sliding layers the warpgroups' parts."""
        return max(sum(self.attention_parts(is_sliding)) for is_sliding in self.kinds)

    def attention_parts(self, is_sliding: bool) -> tuple[int, int, int, int]:
        """Words of the queries, of new keys and of new values; on sliding layers of the warpgroups' parts."""
        kind = self.attention(is_sliding)
        queries = ROWS * (1 if is_sliding else kind.tiles) * kind.key_words
        parts = CONSUMERS * ROWS * kind.part_stride if is_sliding else 0
        return queries, self.tokens * kind.key_words, self.tokens * kind.value_words, parts

    @property
    def sum_words(self) -> int:
        """Sums of each item, of each warp that works on it; or the products of a CTA's columns for all pairs; or the
        router's sums."""
        parts = max(self.items(kind) * self.ways(kind) for kind in self.products)
        down, router = self.down.splits * self.pairs * OWN_COLUMNS, self.router.sums(self.columns)
        return max(parts * WARPS * self.columns * ROWS, down, router)

    @property
    def slots(self) -> int:
        """Of the ring."""
        words = self.area_words + self.list_words
        return min((SHARED_BYTES - 4 * words) // (4 * SLOT_WORDS), MOST_SLOTS)

    @property
    def list_words(self) -> int:
        """Ids, weights, lists of experts and of their pairs; own columns of stream and sums; factors."""
        lists = self.most_listed * (1 + self.columns) + 1 + list_scratch(self.target.experts)
        return 2 * self.pairs + lists + self.columns * (1 + 2 * OWN_COLUMNS)

    # Parts of the tiles' configuration.

    @property
    def router(self) -> Router:
        return Router(self.target.experts, self.target.width, self.ctas)

    def reads(self, kind: Kind) -> str:
        """The format whose inputs a product reads (`config.INPUT_TYPE`)."""
        return self.formats[Kind.EXPERT_GATE_UP if kind == Kind.ROUTER else kind]

    @property
    def stream(self) -> Stream:
        return Stream(self.columns, self.target.width, self.matrix(Kind.QKV).columns, OWN_COLUMNS)
