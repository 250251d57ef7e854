"""A checkpoint keeps its drafter: put in atomically, carried through conversions, found by `load`."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import mimo_jax as mimo
from mimo_jax.checkpoint import dflash
from mimo_jax.checkpoint.convert import to_huggingface, to_orbax, verify
from mimo_jax.checkpoint.dflash import attach_drafter, read_drafter
from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.decode.drafter import PLAIN
from mimo_jax.errors import UserError
from mimo_jax.loading import with_drafter
from mimo_jax.modeling.dflash import init_drafter
from mimo_jax.sharding import MeshShape, make_mesh
from tests.config.test_drafter import PUBLISHED

DRAFTER = DrafterConfig(
    hidden_size=192,
    intermediate_size=64,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=24,
    target_layer_ids=(0, 5),
    num_target_layers=6,
    vocab_size=4000,
    mask_token_id=5,
    window=32,
    bias_rank=16,
    lookup=32,
    acceptance_length=3.5,
    published_acceptance_length=2.5,
    dtype="float32",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The bundled model with a drafter of random weights."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    shutil.copytree(mimo.BUNDLED, folder)
    attach_drafter(folder, DRAFTER, init_drafter(DRAFTER, jax.random.key(0)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_attached_drafter_is_whole_and_used(checkpoint):
    """The manifest covers it, `load` drafts with it, and greedy text is what it is without."""
    assert verify(checkpoint)["verified"]
    drafting, plain = mimo.load(checkpoint, draft="dflash"), mimo.load(checkpoint)
    assert drafting.drafter.block_size == 8 and drafting.drafter.expected == 3.5
    assert plain.drafter is PLAIN
    texts = [mimo.generate(model, "def fib(n):\n", mimo.Greedy(), max_tokens=40) for model in (drafting, plain)]
    assert texts[0].tokens == texts[1].tokens
    assert texts[0].acceptance.rounds <= texts[1].acceptance.rounds


def test_conversions_carry_the_drafter(checkpoint, tmp_path):
    """To Orbax and back, every file of `dflash/` keeps its bytes, extras and all."""
    assert {"config.json", "extras/config.json", "extras/extras.safetensors"} <= contents(checkpoint / "dflash").keys()
    to_orbax(checkpoint, tmp_path / "orbax")
    to_huggingface(tmp_path / "orbax", tmp_path / "back")
    for folder in ("orbax", "back"):
        assert contents(tmp_path / folder / "dflash") == contents(checkpoint / "dflash")
        assert verify(tmp_path / folder)["verified"]


def test_attaching_replaces_or_leaves_everything(checkpoint, tmp_path, monkeypatch):
    """A second drafter takes the first one's place; one that fails half-way leaves the checkpoint as it was."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    deeper = dataclasses.replace(DRAFTER, num_layers=2)
    attach_drafter(folder, deeper, init_drafter(deeper, jax.random.key(1)))
    assert read_drafter(folder / "dflash")[0].num_layers == 2
    assert verify(folder)["verified"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dflash, "torch_file", full)
    with pytest.raises(UserError, match="could not be written"):
        attach_drafter(folder, DRAFTER, init_drafter(DRAFTER, jax.random.key(0)))
    assert read_drafter(folder / "dflash")[0].num_layers == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_drafter_of_another_geometry_is_refused(checkpoint, tmp_path):
    """`load` says which value does not fit which."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    other = dataclasses.replace(DRAFTER, num_target_layers=12)
    attach_drafter(folder, other, init_drafter(other, jax.random.key(0)))
    with pytest.raises(UserError, match="num_target_layers=12, but the target has 6"):
        mimo.load(folder, draft="dflash")


def test_the_published_part_drafts_alone(checkpoint):
    """Without its extras the drafter is what other engines read, expects its own acceptance, and changes no token."""
    plain = mimo.load(checkpoint, draft="none")
    alone = with_drafter(plain, checkpoint / "dflash", extras=False)
    assert not alone.drafter.config.has_extras and alone.drafter.expected == 2.5
    assert not {"bias_in", "bias_out", "guess", "matched"} & alone.draft_params.keys()
    texts = [mimo.generate(model, "def fib(n):\n", mimo.Greedy(), max_tokens=20) for model in (alone, plain)]
    assert texts[0].tokens == texts[1].tokens


def test_bytes_read_are_the_bytes_written(checkpoint):
    """Parameters come back as the BF16 they were stored in."""
    _, params = read_drafter(checkpoint / "dflash")
    expected = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), init_drafter(DRAFTER, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_bundled_drafter_is_in_the_published_format():
    """Its folder has the published files and keys, and no others but the acceptance; the rest lies in `extras/`."""
    folder = mimo.BUNDLED / "dflash"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "dflash_draft_model.safetensors",
        "extras",
        "mask_embedding.pt",
        "model.safetensors.index.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() - PUBLISHED.keys() == {"hidden_act", "initializer_range", "torch_dtype"}
    assert config["dflash_config"].keys() - PUBLISHED["dflash_config"].keys() == {"acceptance_length"}
    whole, alone = read_drafter(folder)[0], read_drafter(folder, extras=False)[0]
    assert whole.has_extras and alone == whole.published and alone.acceptance_length < whole.acceptance_length


def test_long_blocks_are_refused_on_a_mesh(tmp_path):
    """Rounds on a mesh have the rows of a published block, whoever drafts: a longer one is for one device."""
    config = dataclasses.replace(DRAFTER, block_size=12)
    dflash.write_drafter(tmp_path / "long", config, init_drafter(config, jax.random.key(0)))
    model = mimo.load(draft="none")
    assert with_drafter(model, tmp_path / "long").drafter.block_size == 12
    spread = dataclasses.replace(mimo.load(layout="packed", draft="none"), mesh=make_mesh(MeshShape(tensor=8)))
    with pytest.raises(UserError, match="block_size=12; on a mesh blocks have at most 8 tokens"):
        with_drafter(spread, tmp_path / "long")
