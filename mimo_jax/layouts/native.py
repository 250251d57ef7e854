"""Weights as the native step reads them: the bits of the files, rearranged into one array of bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.config.model import GLOBAL, SLIDING, ModelConfig
from mimo_jax.modeling.layers import rotary_frequencies
from mimo_jax.weights import BlockFp8Tensor, MxTensor, Params
from mimo_jax.weights.params import STACKS
from pallas_kernels.decode_step import (
    DRAFT_LAYER_SLOTS,
    DRAFT_TOP_SLOTS,
    LAYER_SLOTS,
    TOP_SLOTS,
    Blob,
    Packed,
    Stored,
    joined,
    stored_fp8,
    unavailable,
)

NATIVE = "native"  # the only parameter: all others are in it
BIAS = ("bias_in", "bias_out")  # of a drafter; XLA reads these, too, where it draws drafts


def reason_against(config: ModelConfig) -> str | None:
    """What keeps the native step from serving a model of this geometry on this machine."""
    if config.v_head_dim % 8:
        return f"v_head_dim={config.v_head_dim} must be a multiple of 8"
    return unavailable()


def reason_against_drafter(config: DrafterConfig) -> str | None:
    """The same for a drafter."""
    if config.head_dim % 8:
        return f"head_dim={config.head_dim} must be a multiple of 8"
    if config.num_heads * config.head_dim % 16:
        return f"num_heads={config.num_heads} x head_dim={config.head_dim} must be a multiple of 16"
    return None


def pack(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Parameters of any file format; activations are float32. Layers that predict ahead (MTP) are left out."""
    blob = Blob(len(TOP_SLOTS) + len(LAYER_SLOTS) * config.num_layers)
    top = TOP_SLOTS.index
    blob.add_table(top("embed"), np.asarray(params["embed"]))
    blob.add_matrix(top("head"), _stored(params["head"]))
    blob.add_vector(top("norm"), params["norm"]["weight"])
    for name, kind in (("global_frequencies", GLOBAL), ("sliding_frequencies", SLIDING)):
        blob.add_vector(top(name), rotary_frequencies(config.rotary_dim, config.theta(kind)))
    for index in range(config.num_layers):
        slots = _layer_slots(LAYER_SLOTS, len(TOP_SLOTS), index)
        layer = params[f"layers_{index}"]
        _add_attention(blob, slots, layer)
        _add_ffn(blob, slots, layer.get("moe") or layer["mlp"])
    return dataclasses.replace(config, dtype="float32"), {NATIVE: _finished(blob)}


def pack_drafter(config: DrafterConfig, params: Params) -> Params:
    """Parameters of a drafter."""
    blob = Blob(len(DRAFT_TOP_SLOTS) + len(DRAFT_LAYER_SLOTS) * config.num_layers)
    top = DRAFT_TOP_SLOTS.index
    blob.add_matrix(top("fuse"), _stored(params["fuse"]))
    for name in ("norm", "context_norm"):
        blob.add_vector(top(name), params[name]["weight"])
    blob.add_vector(top("mask"), params["mask"])
    for name, theta in (("context_frequencies", config.context_theta), ("block_frequencies", config.block_theta)):
        blob.add_vector(top(name), rotary_frequencies(config.rotary_dim, theta))
    if config.bias_rank:
        blob.add_table(top("bias_in"), np.asarray(params["bias_in"]))
        blob.add_matrix(top("bias_out"), _stored(params["bias_out"]))
    if config.lookup:
        blob.add_matrix(top("guess"), _stored(params["guess"]))
        blob.add_table(top("matched"), np.asarray(params["matched"]))
    for index in range(config.num_layers):
        slots, layer = _layer_slots(DRAFT_LAYER_SLOTS, len(DRAFT_TOP_SLOTS), index), params[f"layers_{index}"]
        _add_attention(blob, slots, layer)
        for name in ("q_norm", "k_norm"):
            blob.add_vector(slots[name], layer["attention"][name]["weight"])
        _add_ffn(blob, slots, layer["mlp"])
    return {NATIVE: _finished(blob), **{name: jnp.asarray(params[name]) for name in BIAS if name in params}}


def _layer_slots(names: tuple[str, ...], first: int, index: int) -> dict[str, int]:
    return {name: first + len(names) * index + place for place, name in enumerate(names)}


def _finished(blob: Blob) -> Packed:
    return Packed(*map(jnp.asarray, blob.finish()))


def _add_attention(blob: Blob, slots: dict[str, int], layer: Params) -> None:
    attention = layer["attention"]
    for name in ("input_norm", "post_norm"):
        blob.add_vector(slots[name], layer[name]["weight"])
    names = ("qkv",) if "qkv" in attention else ("q", "k", "v")
    blob.add_matrix(slots["qkv"], joined(*(_stored(attention[name]).merged() for name in names)))
    blob.add_matrix(slots["output"], _stored(attention["o"]))
    if "sink" in attention:
        blob.add_vector(slots["sink"], attention["sink"])


def _add_ffn(blob: Blob, slots: dict[str, int], ffn: Params) -> None:
    gate, up, down = (_stored(ffn[name]) for name in STACKS)
    blob.add_alternating(slots["gate_up"], gate, up)
    blob.add_matrix(slots["down"], down)
    if "router" in ffn:
        blob.add_matrix(slots["router"], _stored(ffn["router"]))
        blob.add_vector(slots["router_bias"], ffn["router_bias"])


def _stored(weight: Any) -> Stored:
    if isinstance(weight, MxTensor):
        return Stored(np.asarray(weight.codes), np.asarray(weight.scales))
    if isinstance(weight, BlockFp8Tensor):
        return stored_fp8(np.asarray(weight.codes), np.asarray(weight.scales))
    return Stored(np.asarray(weight))
