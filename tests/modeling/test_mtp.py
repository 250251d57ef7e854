"""Multi-token prediction against a direct restatement of its equations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config.model import SLIDING
from mimo_jax.modeling.attention import Attention
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.layers import rotary_table
from tests.tiny import random_params, random_tokens, tiny_config


@partial(jax.jit, static_argnums=0)
def predict(config, params, tokens):
    """The features of `tokens` and every MTP layer's logits."""
    model = Backbone(config)
    _, features, _ = model.apply({"params": params}, tokens)
    return features, model.apply({"params": params}, features.hidden, tokens, method="predict_ahead")


def rms(x, gain, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.asarray(gain["weight"], np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def restated(layer: dict, embedded, hidden, config) -> np.ndarray:
    """Embedding half first, then the hidden half; sliding attention; dense SwiGLU; final norm. In float64."""
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layer)
    eps = config.norm_eps
    halves = [rms(embedded, layer["embed_norm"], eps), rms(hidden, layer["hidden_norm"], eps)]
    x = np.concatenate(halves, axis=-1) @ weights["eh_proj"].T
    rotary = rotary_table(jnp.arange(x.shape[1])[None], config.rotary_dim, config.sliding_rope_theta, jnp.float32)
    normed = jnp.asarray(rms(x, layer["input_norm"], eps), jnp.float32)
    x = x + np.asarray(Attention(config, SLIDING).apply({"params": layer["attention"]}, normed, rotary)[0], np.float64)
    y = rms(x, layer["pre_mlp_norm"], eps)
    x = x + (silu(y @ weights["mlp"]["gate"].T) * (y @ weights["mlp"]["up"].T)) @ weights["mlp"]["down"].T
    return rms(x, layer["final_norm"], eps)


def test_layers_form_the_published_chain():
    """Layer k merges the k-th next token's embedding with layer k - 1's output and predicts one token further."""
    config = tiny_config(mtp_layers=2)
    params = random_params(config)
    tokens = random_tokens(config, 1, 19)
    features, ahead = predict(config, params, tokens)
    hidden = np.asarray(features.hidden, np.float64)
    embed, head = np.asarray(params["embed"], np.float64), np.asarray(params["head"], np.float64)
    for depth, logits in enumerate(ahead, start=1):
        shifted = np.concatenate([tokens[:, depth:], np.repeat(tokens[:, -1:], depth, axis=1)], axis=1)
        hidden = restated(params[f"mtp_{depth - 1}"], embed[shifted], hidden, config)
        # float32 against float64 through two layers, logits of scale 3.
        np.testing.assert_allclose(logits, hidden @ head.T, atol=2e-5)


def test_no_prediction_sees_its_own_target():
    """The logits for token t + d + 1 do not change when that token or a later one does."""
    config = tiny_config(mtp_layers=2)
    params = random_params(config)
    tokens = random_tokens(config, 1, 16)
    changed = tokens.copy()
    changed[0, 10:] = (changed[0, 10:] + 7) % config.vocab_size
    predictions = [predict(config, params, window)[1] for window in (tokens, changed)]
    for depth, (before, after) in enumerate(zip(*predictions), start=1):
        untouched = 10 - depth  # position t reads tokens up to t + depth
        np.testing.assert_allclose(before[:, :untouched], after[:, :untouched], atol=1e-6)
        assert np.abs(before[:, untouched] - after[:, untouched]).max() > 1e-3
