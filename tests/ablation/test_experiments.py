"""Each experiment makes a run on a small corpus; what it varies changes what it should."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.ablation import target
from mimo_jax.ablation.experiments import EXPERIMENTS
from mimo_jax.errors import UserError
from mimo_jax.loading import BUNDLED
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training import corpus
from tests.tiny import random_params, tiny_config

ROOT = Path(__file__).parents[2]
SMALL = {
    "rounding": {"width": 64, "steps": 3, "descent": 2, "batch": 2, "windows": 2},
    "drafter": {"steps": 2, "batch": 2, "texts": 8, "prompts": 2},
    "decoding": {"prompts": 4, "tokens": 8},
    "target": {"windows": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This package's own source as a corpus, cut by the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = Tokenizer.load(BUNDLED / "tokenizer.json")
    corpus.build(folder, [ROOT / "mimo_jax", ROOT / "tests"], 4096, 10**6, tokenizer)
    return folder


def run(name: str, corpus: Path, folder: Path, seed: int = 0, **settings) -> dict[str, float]:
    experiment = EXPERIMENTS[name]
    values = {**experiment.settings, **SMALL[name], "data": str(corpus), **settings}
    experiment.check(values)
    return experiment.run(values, seed, folder)


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_an_experiment_gives_its_metrics(name: str, data: Path, tmp_path: Path) -> None:
    """Those that it lists, as finite numbers."""
    found = run(name, data, tmp_path)
    assert found.keys() == EXPERIMENTS[name].metrics.keys()
    assert all(np.isfinite(value) for value in found.values())


def test_runs_can_be_repeated(data: Path, tmp_path: Path) -> None:
    """The same settings and seed give the same result; another seed reads other text."""
    first = run("target", data, tmp_path)
    assert run("target", data, tmp_path) == first
    assert run("target", data, tmp_path, seed=1) != first


def test_fewer_experts_and_small_blocks_do_what_they_must(data: Path, tmp_path: Path) -> None:
    """One expert in place of two costs bits; a block of two yields at most two tokens per round."""
    one, two = (run("target", data, tmp_path, windows=16, experts_per_token=count) for count in (1, 2))
    assert one["bits_per_byte"] > 1.02 * two["bits_per_byte"]
    assert run("decoding", data, tmp_path, block_size=2)["tokens_per_round"] <= 2


def test_a_router_is_stored_in_the_dtype_and_nothing_else_is() -> None:
    """bfloat16 keeps 8 bits, FP8 with a scale per expert 4; all other arrays are the same objects."""
    params = random_params(tiny_config())
    for dtype, error in ((jnp.bfloat16, 2**-8), (jnp.float8_e4m3fn, 2**-4)):
        found = target.with_router_in(params, jnp.dtype(dtype))
        before, after = (tree["layers_1"]["moe"]["router"] for tree in (params, found))
        worst = float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))
        assert 0 < worst <= error
        assert found["layers_1"]["moe"]["gate"] is params["layers_1"]["moe"]["gate"]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("target", {"experts_per_token": 17}, "experts_per_token=17, but the model has 16"),
        ("target", {"model": "nowhere"}, "model='nowhere' is no folder; expected a checkpoint"),
        ("decoding", {"data": "nowhere"}, "data='nowhere' is no folder; `scripts/train.py corpus`"),
        ("drafter", {"block_size": 17}, "block_size=17 must be a whole number in 2..16"),
        ("rounding", {"qat": 1}, "qat=1 must be one of False, True"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict, words: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        run(name, data, tmp_path, **settings)


def test_a_checkpoint_without_a_drafter_is_named(data: Path, tmp_path: Path) -> None:
    """Before anything runs."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((BUNDLED / "config.json").read_text())
    with pytest.raises(UserError, match="has no drafter"):
        run("decoding", data, tmp_path, model=str(bare))
