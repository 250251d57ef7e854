"""The bundled model: small enough for git, whole, readable by others, and trained."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mimo_jax as mimo
from mimo_jax.checkpoint.convert import verify
from mimo_jax.errors import UserError
from mimo_jax.evaluation.reading import distance
from mimo_jax.loading import load_dense
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.training.pretraining import cross_entropy
from tests.tools.code_picture import CODE

FOLDER, ROOT = mimo.BUNDLED, Path(mimo.__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    return mimo.load(draft="dflash")


def test_it_is_whole_and_small():
    """Every byte is as exported, and the folder stays below 20 MB."""
    assert verify(FOLDER)["verified"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 20e6


def test_it_is_in_the_published_format():
    """The config's switches are those of the FP4-DFlash checkpoint, and the index names every tensor's shard."""
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "mimo_v2"
    assert config["quantization_config"]["store_dtype"] == "mxfp4"
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    safe_open = pytest.importorskip("safetensors").safe_open
    for shard in set(index["weight_map"].values()):
        with safe_open(FOLDER / shard, "np") as file:
            assert set(file.keys()) == {name for name, place in index["weight_map"].items() if place == shard}


def test_transformers_opens_the_tokenizer(model):
    """Another engine's reader gives the same ids, the same special tokens, and a chat prompt."""
    transformers = pytest.importorskip("transformers", reason="another engine's reader is needed to compare with")
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    text = "def naïve(x):\n    return x  # → 42\n"
    assert theirs.encode(text) == model.tokenizer.encode(text)
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    assert theirs.eos_token_id == model.config.eos_token_id
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"


def test_it_has_learnt_python(model):
    """Code it was not trained on (this package's) costs it under 2 bits per byte; random weights cost about 3.6."""
    text = (Path(mimo.__file__).parent / "decode" / "sampling.py").read_text()
    ids = model.tokenizer.encode(text)[:769]
    dense = load_dense(mimo.BUNDLED)
    logits, _, _ = jax.jit(Backbone(dense.config).apply)({"params": dense.params}, jnp.asarray([ids[:-1]]))
    nats = float(jnp.sum(cross_entropy(logits, jnp.asarray([ids[1:]]))))
    size = len(model.tokenizer.decode(ids[1:]).encode())
    assert nats / size / np.log(2) < 2.0


def test_layouts_write_the_same_text(model):
    """What native code reads on one CPU changes no token."""
    packed = mimo.load(layout="packed", draft="none")
    assert (packed.layout, model.layout) == ("packed", "native")
    exact = dataclasses.replace(packed, config=dataclasses.replace(packed.config, dtype="float32"))
    request = mimo.Request("class Stack:\n    def __init__(self", mimo.Greedy(), max_tokens=24)
    assert mimo.generate(exact, request).tokens == mimo.generate(model, request).tokens


def test_its_generation_config_decides_how_it_samples(model):
    """Temperature 1 and top-p 0.95, as its file says; set aside, greedy."""
    assert model.strategy == mimo.Sampled(temperature=1.0, top_p=0.95)
    assert mimo.load(draft="none", generation_config=False).strategy == mimo.Greedy()
    asked = mimo.generate(model, "def f(", model.strategy, max_tokens=8)
    assert mimo.generate(model, "def f(", max_tokens=8).tokens == asked.tokens


def test_the_drafter_was_trained_for_these_weights(model):
    """With the bundled drafter the same text comes in far fewer rounds, about as many as its config tells to expect."""
    plain, whole = mimo.load(draft="none"), dataclasses.replace(model.drafter, confidence=0.0)
    model = dataclasses.replace(model, drafter=whole)
    prompts = ["import os\nimport sys\n\n\ndef main(argv):\n", "class Stack:\n    def __init__(self"]
    results = [mimo.generate(model, prompt, mimo.Greedy(), max_tokens=40) for prompt in prompts]
    assert [row.tokens for row in results] == [
        mimo.generate(plain, prompt, mimo.Greedy(), max_tokens=40).tokens for prompt in prompts
    ]
    found = sum(row.acceptance.tokens for row in results) / sum(row.acceptance.rounds for row in results)
    expected = model.drafter.expected
    assert expected > 2 and found > 1 + (expected - 1) / 2


def test_it_reads_a_picture_of_code(model):
    """What `make read` prints is the code in the picture, but for a character or two; drafted, it is the same."""
    picture, plain = mimo.Image(ROOT / "docs" / "figures" / "code.png"), mimo.load(draft="none")
    found, drafted = (mimo.generate(one, [picture], mimo.Greedy(), max_tokens=320) for one in (plain, model))
    assert found.text == drafted.text and found.finish_reason == "stop"
    assert distance(CODE, found.text) <= 2


@pytest.mark.parametrize("draft", ["lookup", "mtp"])
def test_whatever_drafts_the_text_is_the_same(draft):
    """Looked-up and MTP drafts beside none; a name that is unknown, and layers that are not there, are named."""
    prompt, plain = "class Stack:\n    def push(self, item):\n", mimo.load(draft="none")
    model = mimo.load(draft=draft)
    found, expected = (mimo.generate(one, prompt, mimo.Greedy(), max_tokens=40) for one in (model, plain))
    assert found.tokens == expected.tokens and found.acceptance.rounds < expected.acceptance.rounds
    with pytest.raises(UserError, match="draft 'ngram' is unknown; known: none, lookup, mtp, dflash"):
        mimo.load(draft="ngram")
    with pytest.raises(UserError, match="draft 'mtp': the native step has no MTP layers"):
        mimo.load(draft="mtp", layout="native")


def test_generating_takes_little_memory_beside_what_importing_does():
    """Weights stay packed: at most 250 MB above what a process holds that has imported JAX and this package."""
    measured = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    imports = "import jax, mimo_jax as mimo, mimo_jax.generation; jax.devices()"
    work = "mimo.generate(mimo.load(draft='none'), 'def f(x):', mimo.Greedy(), max_tokens=64)"
    before, after = (
        int(subprocess.run([sys.executable, "-c", f"{code}; {measured}"], capture_output=True, check=True).stdout)
        for code in (imports, f"{imports}; {work}")
    )
    assert after - before <= 250_000, f"{before} kB after importing, {after} kB after generating"
