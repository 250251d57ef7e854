"""Logits agree with an independent implementation: transformers' MiMoV2FlashForCausalLM, in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config.model import SLIDING, ModelConfig
from mimo_jax.decode.step import FusedStep
from mimo_jax.evaluation.references import build_reference
from mimo_jax.layouts import native
from mimo_jax.modeling.backbone import Backbone
from pallas_kernels.decode_step import Running, usable_paths
from tests.tiny import NATIVE_TOLERANCE, random_tokens, tiny_config

torch = pytest.importorskip("torch", reason="transformers needs torch")
pytest.importorskip("transformers")

WINDOW = 8
LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 5 * WINDOW + 2)
# float32 with other summation orders through four layers: 5e-6 measured at logit scale 5. The promise is 2e-5.
TOLERANCE = 2e-5


def random_reference(config: ModelConfig):
    """The torch model of `config`, random, with non-zero sinks and router biases."""
    model = build_reference(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        scale, shift = (0.2, 1.0) if "norm" in name else (1.0, 0.0) if "sinks" in name else (0.12, 0.0)
        with torch.no_grad():
            parameter.copy_(shift + scale * torch.randn(parameter.shape, generator=generator))
            if name == "lm_head.weight":
                parameter.mul_(1.3)  # logits of scale 5
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def convert(model, config: ModelConfig) -> dict:
    """The torch weights as our parameters, written out by hand: independent of the checkpoint reader."""
    state = {name: jnp.asarray(value.numpy()) for name, value in model.state_dict().items()}

    def attention(prefix: str, kind: int) -> dict:
        q, k, v = (state[f"{prefix}.{name}_proj.weight"] for name in "qkv")
        out = {"o": state[f"{prefix}.o_proj.weight"]}
        if kind == SLIDING:
            out["sink"] = state[f"{prefix}.sinks"]
        if not config.fused_qkv:
            return {**out, "q": q, "k": k, "v": v}
        chunks = [jnp.split(part, config.qkv_chunks) for part in (q, k, v)]
        return {**out, "qkv": jnp.stack([jnp.concatenate(parts) for parts in zip(*chunks)])}

    def ffn(prefix: str, has_experts: int) -> dict:
        if not has_experts:
            return {"mlp": {name: state[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down")}}
        gate, up = jnp.split(state[f"{prefix}.experts.gate_up_proj"], 2, axis=1)
        moe = {"gate": gate, "up": up, "down": state[f"{prefix}.experts.down_proj"]}
        moe |= {
            "router": state[f"{prefix}.gate.weight"],
            "router_bias": state[f"{prefix}.gate.e_score_correction_bias"],
        }
        return {"moe": moe}

    params = {"embed": state["model.embed_tokens.weight"], "head": state["lm_head.weight"]}
    params["norm"] = {"weight": state["model.norm.weight"]}
    for index, (kind, has_experts) in enumerate(zip(config.layer_pattern, config.moe_pattern)):
        prefix = f"model.layers.{index}"
        params[f"layers_{index}"] = {
            "input_norm": {"weight": state[f"{prefix}.input_layernorm.weight"]},
            "post_norm": {"weight": state[f"{prefix}.post_attention_layernorm.weight"]},
            "attention": attention(f"{prefix}.self_attn", kind),
            **ffn(f"{prefix}.mlp", has_experts),
        }
    return params


GEOMETRIES = {
    # Flash: sliding layers have twice the key/value heads, projections stored apart. Pro: equal heads, fused.
    "flash-split": tiny_config(num_kv_heads=1, sliding_num_kv_heads=2, fused_qkv=False, sliding_window=WINDOW),
    "flash-fused": tiny_config(num_kv_heads=1, sliding_num_kv_heads=2, sliding_window=WINDOW),
    "pro-fused": tiny_config(sliding_window=WINDOW),
}


@functools.cache
def reference_of(geometry: str):
    config = GEOMETRIES[geometry]
    model = random_reference(config)
    return model, convert(model, config)


def our_logits(config: ModelConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    config = dataclasses.replace(config, mtp_layers=0)
    return np.asarray(jax.jit(Backbone(config).apply)({"params": params}, tokens)[0])


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


CASES = [(geometry, length) for geometry in ("flash-split", "pro-fused") for length in LENGTHS]
CASES += [(geometry, length) for geometry in ("flash-fused",) for length in (WINDOW + 1, LENGTHS[-1])]


@pytest.mark.parametrize("geometry, length", CASES)
def test_logits_agree(geometry, length):
    """The same weights and tokens give the same logits as transformers, below, at and above the window."""
    model, params = reference_of(geometry)
    config = GEOMETRIES[geometry]
    tokens = random_tokens(config, 2, length, seed=length)
    expected = their_logits(model, tokens)
    assert 4 < np.abs(expected).max() < 30 and expected.std() > 1, "logits must be of a realistic scale"
    np.testing.assert_allclose(our_logits(config, params, tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("path", usable_paths())
def test_logits_of_the_native_step_agree(geometry, path):
    """Native code gives transformers' logits, too: grouped heads, projections apart and fused, beyond the window."""
    model, params = reference_of(geometry)
    length = LENGTHS[-1]
    tokens = random_tokens(GEOMETRIES[geometry], 2, length, seed=length)
    config, packed = native.pack(GEOMETRIES[geometry], params)
    step = FusedStep(config, running=Running(path))
    logits, _, _ = jax.jit(step)(packed, tokens, step.init_cache(2, length), np.full(2, length, np.int32))
    np.testing.assert_allclose(logits, their_logits(model, tokens), atol=NATIVE_TOLERANCE[path], rtol=0)


def test_window_off_by_one_is_noticed():
    """The window counts keys: 128 and 129 are different models, and the comparison above can tell."""
    model, params = reference_of("pro-fused")
    config = GEOMETRIES["pro-fused"]
    tokens = random_tokens(config, 1, 2 * WINDOW, seed=3)
    expected = their_logits(model, tokens)
    for window in (WINDOW - 1, WINDOW + 1):
        logits = our_logits(dataclasses.replace(config, sliding_window=window), params, tokens)
        assert np.abs(logits - expected).max() > 0.1


def test_auxiliary_hidden_states_are_those_after_their_layers():
    """They equal transformers' hidden states, whose number i + 1 comes after layer i, in the order asked for."""
    model, params = reference_of("pro-fused")
    config = dataclasses.replace(GEOMETRIES["pro-fused"], mtp_layers=0)
    tokens = random_tokens(config, 2, 11)
    with torch.no_grad():
        states = model(torch.from_numpy(tokens).long(), use_cache=False, output_hidden_states=True).hidden_states
    layers = (2, -1, 0)
    _, features, _ = jax.jit(Backbone(config, layers).apply)({"params": params}, tokens)
    expected = np.concatenate([states[layer + 1].numpy() for layer in layers], axis=-1)
    np.testing.assert_allclose(features.aux, expected, atol=TOLERANCE, rtol=0)
