"""Configs as the decode step's kernels know them: sizes and constants."""

from __future__ import annotations

from mimo_jax.config.drafter import LONGEST_MATCH, DrafterConfig
from mimo_jax.config.model import SLIDING, ModelConfig
from pallas_kernels.decode_step import Drafter, Layer, Target


def target_of(config: ModelConfig) -> Target:
    """The geometry of a text model."""
    return Target(
        vocab=config.vocab_size,
        width=config.hidden_size,
        layers=tuple(
            Layer(kind == SLIDING, bool(experts)) for kind, experts in zip(config.layer_pattern, config.moe_pattern)
        ),
        heads=config.num_heads,
        global_kv_heads=config.num_kv_heads,
        sliding_kv_heads=config.sliding_num_kv_heads,
        head_dim=config.head_dim,
        value_dim=config.v_head_dim,
        features=config.intermediate_size,
        expert_features=config.moe_intermediate_size,
        experts=config.num_experts,
        chosen=config.experts_per_token,
        window=config.sliding_window,
        rotary=config.rotary_dim,
        chunks=config.qkv_chunks if config.fused_qkv else 1,
        global_theta=config.rope_theta,
        sliding_theta=config.sliding_rope_theta,
        value_scale=config.value_scale,
        norm_eps=config.norm_eps,
    )


def drafter_of(config: DrafterConfig, target: ModelConfig) -> Drafter:
    """The geometry of a DFlash drafter of `target`."""
    return Drafter(
        target_vocab=target.vocab_size,
        vocab=config.vocab_size,
        width=config.hidden_size,
        features=config.intermediate_size,
        num_layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        aux_layers=config.target_layer_ids,
        block=config.block_size,
        window=config.window,
        rotary=config.rotary_dim,
        context_theta=config.context_theta,
        block_theta=config.block_theta,
        value_scale=config.value_scale,
        norm_eps=config.norm_eps,
        has_sink=config.has_sink,
        bias_rank=config.bias_rank,
        lookup=config.lookup,
        longest_match=LONGEST_MATCH,
    )
