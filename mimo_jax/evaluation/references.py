"""An independent implementation: transformers' MiMoV2FlashForCausalLM in our geometry. For tests and benchmarks; needs
torch.
"""

from __future__ import annotations

import jax
import numpy as np

from mimo_jax.config.model import SLIDING, ModelConfig
from mimo_jax.weights import Params


def build_reference(config: ModelConfig):
    """A torch model, float32 and in eval mode, of the geometry of `config`; it has no MTP layers."""
    import torch
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

    rope = {"rope_type": "default", "partial_rotary_factor": config.partial_rotary_factor}
    reference = MiMoV2FlashForCausalLM(
        MiMoV2FlashConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={
                "full_attention": {**rope, "rope_theta": config.rope_theta},
                "sliding_attention": {**rope, "rope_theta": config.sliding_rope_theta},
            },
            moe_intermediate_size=config.moe_intermediate_size,
            num_experts_per_tok=config.experts_per_token,
            n_routed_experts=config.num_experts,
            head_dim=config.head_dim,
            v_head_dim=config.v_head_dim,
            sliding_window=config.sliding_window,  # keys including the query's own, as in ours
            layer_types=["sliding_attention" if kind else "full_attention" for kind in config.layer_pattern],
            mlp_layer_types=["sparse" if moe else "dense" for moe in config.moe_pattern],
            attention_value_scale=config.value_scale,
            max_position_embeddings=config.max_position,
            attn_implementation="eager",
        )
    )
    # Its sliding layers always have twice the key/value heads; Pro's have as many as the global ones.
    for layer, kind in zip(reference.model.layers, config.layer_pattern):
        attention, heads = layer.self_attn, config.kv_heads(kind)
        attention.k_proj = torch.nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        attention.v_proj = torch.nn.Linear(config.hidden_size, heads * config.v_head_dim, bias=False)
        attention.num_key_value_groups = config.num_heads // heads
    return reference.float().eval()


def load_weights(reference, config: ModelConfig, params: Params) -> None:
    """Gives the reference our parameters, plain arrays."""
    import torch

    state = {
        name: torch.from_numpy(np.array(value, np.float32)) for name, value in reference_state(config, params).items()
    }
    reference.load_state_dict(state, strict=True)


def reference_state(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Our parameters under the reference's names."""
    params = jax.tree.map(np.asarray, params)
    state = {
        "model.embed_tokens.weight": params["embed"],
        "lm_head.weight": params["head"],
        "model.norm.weight": params["norm"]["weight"],
    }
    for index, kind in enumerate(config.layer_pattern):
        layer, prefix = params[f"layers_{index}"], f"model.layers.{index}"
        state[f"{prefix}.input_layernorm.weight"] = layer["input_norm"]["weight"]
        state[f"{prefix}.post_attention_layernorm.weight"] = layer["post_norm"]["weight"]
        for name, weight in zip("qkv", split_qkv(config, kind, layer["attention"])):
            state[f"{prefix}.self_attn.{name}_proj.weight"] = weight
        state[f"{prefix}.self_attn.o_proj.weight"] = layer["attention"]["o"]
        if kind == SLIDING:
            state[f"{prefix}.self_attn.sinks"] = layer["attention"]["sink"]
        if "mlp" in layer:
            state |= {f"{prefix}.mlp.{name}_proj.weight": weight for name, weight in layer["mlp"].items()}
            continue
        gate, up, down = (layer["moe"][name] for name in ("gate", "up", "down"))
        state[f"{prefix}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        state[f"{prefix}.mlp.experts.down_proj"] = down
        state[f"{prefix}.mlp.gate.weight"] = layer["moe"]["router"]
        state[f"{prefix}.mlp.gate.e_score_correction_bias"] = layer["moe"]["router_bias"]
    return state


def split_qkv(config: ModelConfig, kind: int, attention: Params) -> list[np.ndarray]:
    """Q, K, V projections as separate [rows, D] matrices, heads in order."""
    if not config.fused_qkv:
        return [attention[name] for name in "qkv"]
    heads, kv_heads = config.num_heads // config.qkv_chunks, config.kv_heads(kind) // config.qkv_chunks
    ends = np.cumsum([heads * config.head_dim, kv_heads * config.head_dim])
    return [part.reshape(-1, config.hidden_size) for part in np.split(attention["qkv"], ends, axis=1)]
