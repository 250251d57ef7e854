"""Training refuses in one line what it cannot train with: numbers, corpora, runs and texts."""

import dataclasses
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config.presets import preset
from mimo_jax.errors import UserError
from mimo_jax.training import pretraining, run
from mimo_jax.training.corpus import load_tokens
from mimo_jax.training.drafter import DraftTrainConfig, Geometry
from mimo_jax.training.pretraining import TrainConfig
from mimo_jax.training.self_distillation import DistillationConfig, load_texts
from tests.tiny import tiny_config

CONFIG = tiny_config()
TRAIN = TrainConfig(batch=4, length=16)


@pytest.mark.parametrize("config", [TrainConfig(), DraftTrainConfig(1), DistillationConfig(), Geometry()], ids=repr)
def test_every_number_of_a_config_has_its_range(config, unchecked):
    """NaN, infinities, words and sizes beyond any device are refused where the config is made."""
    for field in dataclasses.fields(config):
        if isinstance(getattr(config, field.name), bool | str | None):
            continue
        for value in (math.nan, math.inf, -math.inf, -5, 10**12, "3", None, (math.nan,)):
            with pytest.raises(UserError, match=field.name.removesuffix("s")):
                dataclasses.replace(config, **{field.name: value})


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_weights_that_are_nan_are_never_saved(name, tmp_path):
    """A run that has lost its way stops with one line that says so; what was saved before stays the newest."""

    def update(state, step):
        return state, {"loss": jnp.float32(2), "gradient_norm": jnp.float32(1), name: jnp.float32(math.nan)}

    with pytest.raises(UserError, match=f"{name} is nan at step 10"):
        run.train_until(tmp_path, types.SimpleNamespace(step=0), 20, update, 1)
    assert not (tmp_path / "checkpoints").exists()


def test_a_corpus_that_does_not_fit_is_refused_before_a_run_begins():
    """Too few tokens for a batch, or tokens of another tokenizer, which indexing would clamp in silence."""
    tokens = np.full(100, CONFIG.vocab_size, np.uint16)
    with pytest.raises(UserError, match="a batch needs 4"):
        run.pretraining_update(tokens[:20], CONFIG, TRAIN)
    with pytest.raises(UserError, match=f"token {CONFIG.vocab_size} is none of"):
        run.pretraining_update(tokens, CONFIG, TRAIN)


def test_a_model_beyond_the_memory_is_refused():
    """Random weights for the full model would take what no machine has; the system would end the process."""
    with pytest.raises(UserError, match=r"memory: .* GB at least; this machine has"):
        pretraining.init_state(preset("mimo-v2.5-pro"), TrainConfig())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"model": []}', b'{"model": {}, "train": 3}', b"[" * 100_000]
)
def test_a_run_json_of_any_content_is_one_line(content, tmp_path):
    """Whatever lies where a run should be is named."""
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json"):
        run.read_settings(tmp_path)
    with pytest.raises(UserError, match=r"run\.json"):
        run.prepare(tmp_path, {"model": {"a": 1}})


@pytest.mark.parametrize(
    "content", ["", "\n", "{\n", "[]\n", '{"step": 1}\n', '{"step": "1", "loss": 2}\n', "\udcff\n"]
)
def test_a_log_of_any_content_is_one_line(content, tmp_path):
    """What a killed run, or something else, left in place of a log."""
    (tmp_path / "log.jsonl").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"log\.jsonl"):
        run.read_log(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", b"abc"])
def test_tokens_of_an_odd_size_are_one_line(content, tmp_path):
    """A file cut short is no list of 16-bit ids."""
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.bin: \d bytes"):
        load_tokens(tmp_path, "train")


def chunk(**changes) -> dict[str, np.ndarray]:
    arrays = {"tokens": np.ones((2, 8), np.uint16), "starts": np.ones(2, np.int32), "ends": np.full(2, 8, np.int32)}
    return arrays | changes


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK\x03\x04" + b"\0" * 60])
def test_a_chunk_of_any_content_is_one_line(content, tmp_path):
    """What is no file of texts is named, with what to do."""
    (tmp_path / "chunk-00000.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"chunk-00000\.npz: not a chunk of texts"):
        load_texts(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": np.ones(8, np.uint16)},
        {"starts": np.ones(3, np.int32)},
        {"ends": np.ones(2)},
        {"tokens": np.array({})},
    ],
)
def test_a_chunk_of_other_arrays_is_one_line(changes, tmp_path):
    """Arrays of another shape or dtype, and pickled objects."""
    np.savez(tmp_path / "chunk-00000.npz", **chunk(**changes))
    with pytest.raises(UserError, match="not a chunk of texts"):
        load_texts(tmp_path)


def test_chunks_of_two_lengths_are_one_line(tmp_path):
    """Self-distillation given twice with different lengths."""
    np.savez(tmp_path / "chunk-00000.npz", **chunk())
    np.savez(tmp_path / "chunk-00001.npz", **chunk(tokens=np.ones((2, 9), np.uint16)))
    with pytest.raises(UserError, match=r"chunks of \[8, 9\] tokens"):
        load_texts(tmp_path)
