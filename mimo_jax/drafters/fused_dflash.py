"""DFlash in two calls of native code: one fills a block and picks its tokens, one takes in what the target has read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mimo_jax.config.geometry import drafter_of
from mimo_jax.config.model import ModelConfig
from mimo_jax.decode.drafter import Draft, DraftContext, ReadTokens, Weights, confident
from mimo_jax.decode.sampling import Greedy
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.errors import UserError
from mimo_jax.layouts.native import NATIVE, reason_against_drafter
from mimo_jax.modeling.linear import linear
from pallas_kernels import decode_step


@dataclasses.dataclass(frozen=True)
class FusedDFlashDrafter(DFlashDrafter):
    """The same drafter beside a `FusedStep`; parameters of the layout "native". `running` is for tests."""

    target: ModelConfig
    running: decode_step.Running = decode_step.NORMALLY
    confidence: float = dataclasses.field(default=0.2, kw_only=True)  # verifying takes time for each draft

    def __post_init__(self) -> None:
        if reason := reason_against_drafter(self.config):
            raise UserError(f"the native step cannot serve this drafter: {reason}")

    @property
    def geometry(self) -> decode_step.Drafter:
        return drafter_of(self.config, self.target)

    def empty_rings(self, batch: int) -> decode_step.DraftCache:
        return decode_step.init_draft_cache(self.geometry, batch)

    def updated_rings(self, weights: Weights, layers: Any, read: ReadTokens) -> decode_step.DraftCache:
        context = (read.features.aux, read.lengths_B, read.counts_B)
        return decode_step.update_context(self.geometry, weights.drafter[NATIVE], *context, layers, self.running)

    def propose(self, context: DraftContext) -> Draft:
        is_greedy = isinstance(context.strategy, Greedy)
        tokens_BM, likely_BM, logits_BMC = decode_step.draft(
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
            return Draft(tokens_BM, None, confident(likely_BM, self.confidence))

        def bias_of(previous_B: Int[Array, "B"]) -> Float[Array, "B C"]:
            bias_in, bias_out = (context.weights.drafter[name] for name in ("bias_in", "bias_out"))
            return linear(bias_in[previous_B].astype(jnp.float32), bias_out)

        return self.draw(context, logits_BMC, bias_of)
