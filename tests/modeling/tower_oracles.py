"""Independent towers from packages, random and small: NeMo Automodel's, transformers' Qwen2, mlx-audio's codes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from mimo_jax.config.towers import AudioConfig, AudioTokenizerConfig, VisionConfig
from mimo_jax.modeling.audio import init_audio


def put(tree: dict[str, Any], path: list[str], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def drawn(rng: np.random.Generator, tree: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: rng.normal(0, 0.25, leaf.shape).astype(np.float32), tree)


def randomized(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Its parameters, drawn anew: norms around one, all else around zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, held in module.named_parameters():
            around = 1.0 if "norm" in name or "ln_q" in name else 0.0
            held.copy_(around + 0.2 * torch.randn_like(held))
    return {name: held.detach().numpy() for name, held in module.named_parameters()}


class Nemo:
    """NeMo's tower, which adds sinks to the first key; its weights as our tree."""

    def __init__(self, config: VisionConfig) -> None:
        found = importlib.util.find_spec("nemo_automodel")  # whose own imports need far more than this file of it
        if found is None or found.origin is None:
            pytest.skip("nemo-automodel is not installed")
        path = Path(found.origin).parent / "components/models/mimo_v2_flash/vision.py"
        spec = importlib.util.spec_from_file_location("nemo_vision", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        published = {
            **{"depth": config.depth, "hidden_size": config.hidden_size, "hidden_act": "silu", "in_chans": 3},
            **{"intermediate_size": config.intermediate_size, "num_heads": config.num_heads, "use_sink": True},
            **{"num_key_value_heads": config.num_kv_heads, "qk_channels": config.head_dim, "rms_norm_eps": 1e-6},
            **{"patch_size": config.patch, "temporal_patch_size": 2, "spatial_merge_size": 2},
            **{"fullatt_block_indexes": config.full_blocks, "vit_window_attn_types": list(config.windows)},
            **{"visual_token_window_size": config.window, "out_hidden_size": config.out_size},
        }
        self._patch_values = config.patch_values
        self._tower, self.tree = module.MiMoVisionTransformer(published, dtype=torch.float32), {}
        for name, leaf in randomized(self._tower).items():
            name = name.replace("patch_embed.proj.weight", "patch_embed").replace("merger.mlp.", "merger.mlp_")
            parts = name.split(".")
            put(self.tree, [f"blocks_{parts[1]}", *parts[2:]] if parts[0] == "blocks" else parts, leaf)

    def rows(self, patches_FSP: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """Of all frames, one after another."""
        with torch.no_grad():
            grid = torch.tensor([[len(patches_FSP), rows, columns]])
            return self._tower(torch.tensor(patches_FSP.reshape(-1, self._patch_values)), grid).numpy()


class Qwen:
    """transformers' Qwen2 without a mask over the frames of each row, between our embeddings and our projection."""

    def __init__(self, config: AudioConfig) -> None:
        torch.manual_seed(0)
        shape = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
        heads = {"num_attention_heads": config.num_heads, "num_key_value_heads": config.num_heads}
        rotary = {"rope_type": "default", "rope_theta": config.rope_theta}
        found = Qwen2Config(
            vocab_size=8,
            num_hidden_layers=config.num_layers,
            **shape,
            **heads,
            rope_parameters=rotary,
            attn_implementation="eager",
        )
        self._qwen, self._config = Qwen2Model(found).eval(), config
        held = randomized(self._qwen)
        self.tree = drawn(np.random.default_rng(0), init_audio(config, jax.random.key(0)))
        for index in range(config.num_layers):
            layer, begin = self.tree[f"layers_{index}"], f"layers.{index}."
            layer["attention_norm"]["weight"] = held[f"{begin}input_layernorm.weight"]
            layer["mlp_norm"]["weight"] = held[f"{begin}post_attention_layernorm.weight"]
            for ours, theirs in (("self_attn", "self_attn"), ("local_mlp", "mlp")):
                for name, part in layer[ours].items():
                    layer[ours][name] = {leaf: held[f"{begin}{theirs}.{name}.{leaf}"] for leaf in part}
        self.tree["local_norm"]["weight"] = held["norm.weight"]

    def rows(self, codes_GTN: np.ndarray) -> np.ndarray:
        books = enumerate(self.tree["speech_embeddings"])
        embedded = sum(book[codes_GTN[:, :, channel]] for channel, book in books)
        with torch.no_grad():
            given = torch.tensor(embedded, dtype=torch.float32)
            read = self._qwen(inputs_embeds=given, is_causal=False, use_cache=False).last_hidden_state.numpy()
        flat = torch.tensor(read.reshape(len(codes_GTN), -1) @ self.tree["projection_0"]["weight"].T)
        return torch.nn.functional.gelu(flat).numpy() @ self.tree["projection_2"]["weight"].T


class Mlx:
    """mlx-audio's encoder with our hybrid attention, which its layers know and its config does not; and our tree."""

    def __init__(self, config: AudioTokenizerConfig) -> None:
        self._core = core = pytest.importorskip("mlx.core")
        from mlx.utils import tree_flatten

        theirs = pytest.importorskip("mlx_audio.codec.models.mimo_audio_tokenizer.model")
        published = pytest.importorskip("mlx_audio.codec.models.mimo_audio_tokenizer.config")
        sizes = {
            **{"d_model": config.hidden_size, "n_mels": config.mels, "encoder_layers": config.num_layers},
            **{"encoder_attention_heads": config.num_heads, "encoder_ffn_dim": config.intermediate_size},
        }
        unused = {"decoder_attention_heads": 4, "vocoder_dim": 32, "vocoder_attention_heads": 4}
        books = {"num_quantizers": len(config.codebooks), "codebook_size": list(config.codebooks)}
        window = {"encoder_causal": True, "encoder_attn_window_size": [config.window, 0]}
        self._encoder = theirs.AudioEncoder(published.ModelConfig(**sizes, **unused, **books, **window))
        for layer in self._encoder.layers[1::2]:
            layer.self_attn.window = [-1, -1]
        rng, self.tree, weights = np.random.default_rng(0), {}, []
        for name, held in tree_flatten(self._encoder.parameters()):
            leaf = (float(name.endswith("norm.weight")) + 0.3 * rng.normal(size=held.shape)).astype(np.float32)
            weights.append((name, core.array(leaf)))
            parts = name.replace("layers.", "layers_", 1).split(".") if name.startswith("layers.") else name.split(".")
            if "codebooks" in parts:
                parts = [f"codebook_{parts[2]}"]
            if parts[0] == "down_sample_layer":
                parts = [parts[0], parts[-1]]
            put(self.tree, parts, leaf.transpose(0, 2, 1) if leaf.ndim == 3 else leaf)
        self._encoder.load_weights(weights)

    def codes(self, mel_TM: np.ndarray) -> np.ndarray:
        features = self._encoder(self._core.array(mel_TM)[None], length=len(mel_TM))[0]
        return np.array(self._encoder.quantizer.encode(features, None)).T.astype(np.int32)
