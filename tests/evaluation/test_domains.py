"""Acceptance by domain: which files of prompts are taken, and that what is counted is what `generate` does."""

from pathlib import Path

import pytest

from mimo_jax.decode.sampling import Greedy
from mimo_jax.errors import UserError
from mimo_jax.evaluation import domains
from mimo_jax.generation import generate
from mimo_jax.loading import BUNDLED, Model, load

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def model() -> Model:
    return load(layout="dense", draft="lookup")


def test_shipped_prompts_are_five_domains(model: Model) -> None:
    """Code, prose, chat turns, calls of tools, repetition: each with some texts; chat as the template has it."""
    found = domains.read_domains(domains.PROMPTS, model, BUNDLED)
    assert list(found) == ["code", "prose", "chat", "tools", "repetitive"]
    assert all(len(prompts) >= 8 for prompts in found.values())
    spelt = model.tokenizer.decode(found["chat"][0])
    assert spelt == "user\nWhat is the capital of France?assistant\n"  # special tokens are not spelt
    assert found["chat"][0][0] == model.tokenizer.id_of("<|im_start|>")


def test_rows_are_what_generation_does(model: Model) -> None:
    """Rounds and tokens of a domain are the sums over its prompts, each generated alone."""
    prompts = domains.read_domains(domains.PROMPTS, model, BUNDLED)["repetitive"][:3]
    (row,) = domains.study(model, {"own": prompts}, [0.0], 16)
    alone = [generate(model, prompt, Greedy(), max_tokens=16).acceptance for prompt in prompts]
    assert row["rounds"] == sum(one.rounds for one in alone)
    assert row["tokens_per_round"] == pytest.approx(sum(one.tokens for one in alone) / row["rounds"])
    assert 0 < row["nats_per_token"] < 8.4 and row["domain"] == "own"  # log 4096 is 8.3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no domain"),
        ("[a]\n", "a: expected a table with texts, or with messages"),
        ("[a]\ntexts = ['x', 'y']\nmessages = []\n", "a: expected a table with texts, or with messages"),
        ("[a]\ntexts = ['x']\n", "a: expected a list of two prompts"),
        ("[a]\ntexts = ['x', 3]\n", "a: texts must be strings"),
        ("[a]\ntexts = ['x', '']\n", "prompt: empty"),
        ("[a]\nmessages = [[], []]\n", "messages"),
        ("[a]\ntext = ['x', 'y']\n", "a: expected a table with texts"),
        ("a = 3\n", "a: expected a table"),
        ("[a\n", "Expected"),
    ],
)
def test_bad_files_are_named(text: str, words: str, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        domains.read_domains(path, model, BUNDLED)
