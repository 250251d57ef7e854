"""What rounding a checkpoint's experts to MXFP4 costs on texts it was not calibrated on: plainly, and calibrated."""

from __future__ import annotations

import dataclasses
import sysconfig
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mimo_jax.calibration.convert import tokenizer_of
from mimo_jax.calibration.model import calibrate
from mimo_jax.calibration.texts import read_texts, windows_of
from mimo_jax.checkpoint.read import read
from mimo_jax.cli.progress import progress
from mimo_jax.config.model import ModelConfig
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training.pretraining import cross_entropy
from mimo_jax.training.qat import quantize_experts
from mimo_jax.weights import Params, expand

WINDOW = 512  # tokens
_CODE = ("heapq", "textwrap", "shelve", "sched", "queue", "statistics", "fractions")


def usual_texts() -> dict[str, list[str]]:
    """Texts that come with every Python: modules of its library, and the pages of its manual that `help` shows."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    code = [(library / f"{name}.py").read_text() for name in _CODE]
    return {"code": code, "prose": [topics[name] for name in sorted(topics)[1::4]]}


def compare(
    source: Path, calibration: Path, calibration_windows: int, texts: Mapping[str, list[str]], windows: int
) -> dict[str, Any]:
    """Nats per token and KL to the exact model, of `windows` windows of each text, by how experts are rounded."""
    found = read(source)
    tokenizer = tokenizer_of(source)
    config = dataclasses.replace(found.config, dtype="float32")
    length = min(WINDOW, config.max_position)
    held = {name: windows_of(text, tokenizer, length, windows, name) for name, text in texts.items()}
    learnt = windows_of(read_texts(calibration), tokenizer, length, calibration_windows, str(calibration))
    exact = expand(found.params)
    laws = {name: _laws(exact, config, chosen, "exact") for name, chosen in held.items()}
    arms = {
        "exact": lambda: exact,
        "MXFP4, rounded plainly": lambda: jax.tree.map(np.asarray, jax.jit(quantize_experts)(exact)),
        "MXFP4, calibrated": lambda: expand(calibrate(config, found.params, learnt).params),
    }
    record: dict[str, Any] = {"calibration_tokens": int(learnt.size), "windows": windows, "arms": {}}
    for name, params_of in arms.items():
        params = params_of()
        record["arms"][name] = {
            text: _losses(params, config, tokenizer, chosen, laws[text], name) for text, chosen in held.items()
        }
    return record


def _laws(params: Params, config: ModelConfig, windows_NT: np.ndarray, label: str) -> list[np.ndarray]:
    """Log-probabilities of every token after each place, a window at a time, in 16 bits: they are many."""
    with progress(label, len(windows_NT)) as bar:
        laws = []
        for window_T in windows_NT:
            laws.append(np.asarray(_log_law(params, window_T[None], config)[0].astype(jnp.bfloat16)))
            bar.advance()
    return laws


@partial(jax.jit, static_argnames="config")
def _log_law(params: Params, tokens_BT: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T C"]:
    return jax.nn.log_softmax(Backbone(config).apply({"params": params}, tokens_BT)[0])


@partial(jax.jit, static_argnames="config")
def _distances(
    params: Params, tokens_BT: Int[Array, "B T"], law_BTC: Float[Array, "B T C"], config: ModelConfig
) -> tuple[Float[Array, "B _"], Float[Array, "B T"]]:
    """Nats of each token after the first, and KL(exact || this) at each place."""
    log_BTC, law_BTC = _log_law(params, tokens_BT, config), law_BTC.astype(jnp.float32)
    nats_BT = cross_entropy(log_BTC[:, :-1], tokens_BT[:, 1:])
    return nats_BT, optax.losses.kl_divergence_with_log_targets(log_BTC, law_BTC)


def _losses(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    windows_NT: np.ndarray,
    laws: list[np.ndarray],
    label: str,
) -> dict[str, Any]:
    nats, distances = [], []
    with progress(label, len(windows_NT)) as bar:
        for window_T, law_TC in zip(windows_NT, laws):
            nats_BT, distance_BT = _distances(params, window_T[None], law_TC[None], config)
            nats.append(float(nats_BT.sum()))
            distances.append(float(distance_BT.mean()))
            bar.advance()
    size = np.array(tokenizer.byte_lengths())[windows_NT[:, 1:]].sum()
    bits = float(sum(nats) / np.log(2) / size)
    return {"bits_per_byte": bits, "kl": float(np.mean(distances)), "nats_by_window": nats}


def increases(record: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """By how many percent each arm's loss is above the exact one's, with the half-width of its 95 % interval; window by
    window, so that what makes a window hard drops out.
    """
    exact = record["arms"]["exact"]
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, texts in record["arms"].items():
        found[name] = {}
        for text, losses in texts.items():
            base = np.array(exact[text]["nats_by_window"])
            above = 100 * (np.array(losses["nats_by_window"]) - base) / base.mean()
            half = 1.96 * np.std(above, ddof=1) / np.sqrt(len(above))
            found[name][text] = float(above.mean()), float(half)
    return found
