"""DFlash in two calls of native code: one fills a block and picks its tokens, one takes in what the target has read."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.config.model import ModelConfig
from mimo_jax.decode.drafter import Draft, DraftContext, ReadTokens, Weights, draft_sequentially, mask_unknown
from mimo_jax.decode.geometry import drafter_of
from mimo_jax.decode.sampling import Greedy
from mimo_jax.errors import UserError
from mimo_jax.layouts.native import NATIVE, reason_against_drafter
from mimo_jax.modeling.linear import linear
from pallas_kernels import decode_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FusedDraftCache:
    """The rings of all draft layers, and the newest S tokens for prompt lookup, the last one at the end; -1: none."""

    layers: decode_step.DraftCache
    text: Int[Array, "B S"]


@dataclasses.dataclass(frozen=True)
class FusedDFlashDrafter:
    """The published drafter (`modeling.dflash`) beside a `FusedStep`; parameters of the layout "native"."""

    config: DrafterConfig
    target: ModelConfig
    running: decode_step.Running = decode_step.NORMALLY

    def __post_init__(self) -> None:
        if reason := reason_against_drafter(self.config):
            raise UserError(f"the native step cannot serve this drafter: {reason}")

    @property
    def block_size(self) -> int:
        return self.config.block_size

    @property
    def aux_layers(self) -> tuple[int, ...]:
        return self.config.target_layer_ids

    @property
    def expected(self) -> float | None:
        return self.config.acceptance_length

    @property
    def geometry(self) -> decode_step.Drafter:
        return drafter_of(self.config, self.target)

    def init_cache(self, batch: int, capacity: int) -> FusedDraftCache:
        return FusedDraftCache(
            decode_step.init_draft_cache(self.geometry, batch), jnp.full((batch, self.config.lookup), -1, jnp.int32)
        )

    def update_cache(self, weights: Weights, cache: FusedDraftCache, read: ReadTokens) -> FusedDraftCache:
        layers = decode_step.update_context(
            self.geometry,
            weights.drafter[NATIVE],
            read.features.aux,
            read.lengths_B,
            read.counts_B,
            cache.layers,
            self.running,
        )
        text_BS = jnp.concatenate([cache.text, read.tokens_BT], axis=1)
        newest_BS = read.counts_B[:, None] + jnp.arange(self.config.lookup)
        return FusedDraftCache(layers, jnp.take_along_axis(text_BS, newest_BS, axis=1))

    def propose(self, context: DraftContext) -> Draft:
        is_greedy = isinstance(context.strategy, Greedy)
        tokens_BM, logits_BMC = decode_step.draft(
            self.geometry,
            context.weights.target[NATIVE],
            context.weights.drafter[NATIVE],
            context.anchor_B,
            context.lengths_B,
            context.cache.text,
            context.cache.layers,
            is_greedy,
            self.running,
        )
        if is_greedy:
            return Draft(tokens_BM, None)

        def logits_of(position: int, previous_B: Array, carry: None) -> tuple[Array, None]:
            logits_BC = logits_BMC[:, position]
            if self.config.bias_rank:
                bias_in, bias_out = (context.weights.drafter[name] for name in ("bias_in", "bias_out"))
                bias_BC = linear(bias_in[previous_B].astype(jnp.float32), bias_out)
                logits_BC += jnp.pad(bias_BC, ((0, 0), (0, logits_BC.shape[1] - bias_BC.shape[1])))
            return mask_unknown(logits_BC, self.config.vocab_size), carry

        return draft_sequentially(logits_of, None, context, self.block_size)
