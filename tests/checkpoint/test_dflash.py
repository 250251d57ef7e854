"""The drafter's folder: its name table against the published inventory, its files against torch and against damage."""

import json
import math
import random
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from mimo_jax.checkpoint import dflash
from mimo_jax.checkpoint.dflash import expected_drafter_tensors, has_drafter, read_drafter, write_drafter
from mimo_jax.checkpoint.files.tensorfile import TensorFile
from mimo_jax.checkpoint.files.torchfile import torch_file
from mimo_jax.config.dflash import drafter_from_hf
from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.errors import UserError
from mimo_jax.modeling.dflash import abstract_drafter
from tests.checkpoint import samples
from tests.config.test_drafter import PUBLISHED, SMALL, small
from tests.tools.fuzz import mutate, mutate_bytes


def random_params(config: DrafterConfig, seed: int = 0, dtype=ml_dtypes.bfloat16) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), abstract_drafter(config))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small drafter as written."""
    write_drafter(tmp_path / "dflash", SMALL, random_params(SMALL))
    return tmp_path / "dflash"


EXTRAS = {"bias_rank": 3, "lookup": 5, "acceptance_length": 4.5, "published_acceptance_length": 2.5}


def held_tensors(path: Path) -> samples.Tensors:
    """What a safetensors file holds, copied."""
    file = TensorFile(path)
    return {name: (info.dtype, file.read(name).copy()) for name, info in file.tensors.items()}


def replace_tensors(folder: Path, tensors: samples.Tensors, name: str = dflash.TENSORS) -> None:
    """Other tensors in a single file, which needs no index."""
    (folder / dflash.TENSORS).unlink(missing_ok=True)
    (folder / dflash.INDEX).unlink(missing_ok=True)
    samples.save_file(folder / name, tensors)


def edit_config(folder: Path, **changes) -> None:
    """Changes keys of the folder's `dflash_config`."""
    values = json.loads((folder / "config.json").read_text())
    values["dflash_config"] |= changes
    (folder / "config.json").write_text(json.dumps(values))


def assert_same(params: dict, expected: dict) -> None:
    """Same tree, same shapes and dtypes, same bits."""
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


def test_pro_has_the_published_tensors() -> None:
    """The Pro drafter is 63 tensors of 2.768 billion parameters, with the published names, shapes and dtype."""
    table = expected_drafter_tensors(drafter_from_hf(PUBLISHED), "bfloat16")
    assert len(table) == 63 and {dtype for dtype, _ in table.values()} == {"BF16"}
    assert round(sum(math.prod(shape) for _, shape in table.values()) / 1e9, 3) == 2.768
    layer = {
        "input_layernorm.weight": (6144,),
        "post_attention_layernorm.weight": (6144,),
        "self_attn.q_proj.weight": (16384, 6144),
        "self_attn.k_proj.weight": (1024, 6144),
        "self_attn.v_proj.weight": (1024, 6144),
        "self_attn.o_proj.weight": (6144, 16384),
        "self_attn.q_norm.weight": (128,),
        "self_attn.k_norm.weight": (128,),
        "self_attn.attention_sink_bias": (128,),
        "mlp.gate_proj.weight": (16384, 6144),
        "mlp.up_proj.weight": (16384, 6144),
        "mlp.down_proj.weight": (6144, 16384),
    }
    top = {"fc.weight": (6144, 30720), "hidden_norm.weight": (6144,), "norm.weight": (6144,)}
    layers = {f"layers.{index}.{name}": shape for index in range(5) for name, shape in layer.items()}
    assert {name: shape for name, (_, shape) in table.items()} == top | layers


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("changes", [{}, {"has_sink": False}, EXTRAS, {"bias_rank": 3}, {"lookup": 5}])
def test_round_trip_is_exact(changes: dict, dtype: str, tmp_path) -> None:
    """Config and every bit of every parameter survive the folder, in the tree that `init_drafter` makes."""
    config = small(**changes)
    params = random_params(config, dtype=dtype)
    write_drafter(tmp_path / "dflash", config, params, dtype)
    found, read = read_drafter(tmp_path / "dflash")
    assert found == config
    assert_same(read, params)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_extras_lie_where_no_other_engine_looks(tmp_path) -> None:
    """The folder itself holds the published format to the byte; what goes beyond, in its own folder, is optional."""
    config = small(**EXTRAS)
    params = random_params(config)
    write_drafter(tmp_path / "both", config, params)
    bare = {name: leaf for name, leaf in params.items() if name in abstract_drafter(config.published)}
    write_drafter(tmp_path / "bare", config.published, bare)
    assert files_of(tmp_path / "both") == files_of(tmp_path / "bare")
    assert [path.name for path in tmp_path.glob("*/*") if path.is_dir()] == ["extras"]
    found, read = read_drafter(tmp_path / "both", extras=False)
    assert found == small(acceptance_length=2.5)
    assert_same(read, bare)
    assert read_drafter(tmp_path / "both")[0] == config


def test_the_index_opens_the_folder_for_others(folder: Path) -> None:
    """Converters and serving stacks take files from `model.safetensors.index.json`: it places every tensor."""
    safe_open = pytest.importorskip("safetensors").safe_open
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (shard,) = set(index["weight_map"].values())
    with safe_open(folder / shard, "np") as file:
        assert set(file.keys()) == set(index["weight_map"])
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]
    assert index["metadata"]["total_size"] == 2 * sum(sizes)


BAD_EXTRAS = {
    "missing": (
        lambda t: {n: x for n, x in t.items() if n != "markov_in.weight"},
        "extras: missing 'markov_in.weight'",
    ),
    "surplus": (lambda t: added(t, "fc.weight"), "extras: unexpected 'fc.weight'"),
    "rank": (
        lambda t: t | {"markov_in.weight": ("BF16", np.zeros((48, 2), ml_dtypes.bfloat16))},
        r"'markov_in.weight' has shape \[48, 2\]; the config needs \[48, 3\]",
    ),
    "dtype": (lambda t: t | {"markov_in.weight": ("F32", np.zeros((48, 3), np.float32))}, "is F32; expected BF16"),
}


@pytest.mark.parametrize("case", BAD_EXTRAS)
def test_bad_extras_are_named(case: str, tmp_path) -> None:
    """Every tensor of the extras is used exactly once, too."""
    config = small(**EXTRAS)
    write_drafter(tmp_path / "dflash", config, random_params(config))
    change, message = BAD_EXTRAS[case]
    path = tmp_path / "dflash" / "extras" / "extras.safetensors"
    samples.save_file(path, change(held_tensors(path)))
    with pytest.raises(UserError, match=message):
        read_drafter(tmp_path / "dflash")
    read_drafter(tmp_path / "dflash", extras=False)


def test_float32_masters_are_written_in_the_files_dtype(tmp_path) -> None:
    """Parameters trained in float32 land as the bfloat16 of published files, rounded to nearest."""
    masters = random_params(SMALL, dtype=np.float32)
    write_drafter(tmp_path / "dflash", SMALL, masters)
    _, read = read_drafter(tmp_path / "dflash")
    assert_same(read, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), masters))


def test_mask_vector_is_torchs(folder: Path) -> None:
    """torch reads our mask file safely, and we read torch's, as a vector or as one row, in either dtype."""
    torch = pytest.importorskip("torch")
    _, params = read_drafter(folder)
    theirs = torch.load(folder / "mask_embedding.pt", weights_only=True)
    assert set(theirs) == {"mask_token_id", "embedding"} and theirs["mask_token_id"] == 50
    assert theirs["embedding"].shape == (16,) and theirs["embedding"].dtype == torch.bfloat16
    assert theirs["embedding"].float().tolist() == np.asarray(params["mask"]).astype(np.float32).tolist()
    for embedding in (theirs["embedding"], theirs["embedding"][None], theirs["embedding"].float()):
        torch.save({"mask_token_id": 50, "embedding": embedding}, folder / "mask_embedding.pt")
        assert_same(read_drafter(folder)[1], params)


class Harm:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_malicious_mask_file_is_refused_unexecuted(folder: Path) -> None:
    """A mask file that would run code is an error naming the file, and nothing runs."""
    torch = pytest.importorskip("torch")
    torch.save({"mask_token_id": 50, "embedding": Harm(folder / "harmed")}, folder / "mask_embedding.pt")
    with pytest.raises(UserError, match=r"mask_embedding.pt: .*refused, unexecuted"):
        read_drafter(folder)
    assert not (folder / "harmed").exists()


BAD_MASKS = {
    "token": ({"mask_token_id": 49, "embedding": np.zeros(16, np.float32)}, "is 49; config.json has mask_token_id=50"),
    "no token": ({"embedding": np.zeros(16, np.float32)}, "mask_token_id is of type NoneType"),
    "no vector": ({"mask_token_id": 50}, "embedding is of type NoneType; expected a tensor"),
    "width": ({"mask_token_id": 50, "embedding": np.zeros(15, np.float32)}, r"shape \[15\]; the config needs \[16\]"),
    "dtype": ({"mask_token_id": 50, "embedding": np.zeros(16, np.float16)}, "embedding is F16; expected BF16 or F32"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_masks_are_named(case: str, folder: Path) -> None:
    """A mask vector for another token, of another width or dtype, or absent, is an error with what was found."""
    values, message = BAD_MASKS[case]
    (folder / "mask_embedding.pt").write_bytes(torch_file(values))
    with pytest.raises(UserError, match=message):
        read_drafter(folder)


NEEDED = ["config.json", "dflash_draft_model.safetensors", "mask_embedding.pt", "extras/extras.safetensors"]


@pytest.mark.parametrize("name", NEEDED)
def test_every_file_is_needed(name: str, tmp_path) -> None:
    """A folder that lacks one of its files is an error naming it."""
    write_drafter(tmp_path / "dflash", small(**EXTRAS), random_params(small(**EXTRAS)))
    (tmp_path / "dflash" / name).unlink()
    with pytest.raises(UserError, match=name):
        read_drafter(tmp_path / "dflash")


@pytest.mark.parametrize("file", ["dflash_draft_model-00001-of-00001.safetensors", "model.safetensors"])
def test_prefix_and_other_file_names(file: str, folder: Path) -> None:
    """Tensors called `model.fc.weight`, in a file of another published name, are read the same."""
    _, params = read_drafter(folder)
    tensors = held_tensors(folder / dflash.TENSORS)
    replace_tensors(folder, {f"model.{name}": tensor for name, tensor in tensors.items()}, file)
    assert_same(read_drafter(folder)[1], params)


def shard(folder: Path, stem: str, index: str, prefix: str = "") -> dict[str, str]:
    """Splits the folder's tensors over two files with an index; returns its map."""
    tensors = held_tensors(folder / dflash.TENSORS)
    (folder / dflash.TENSORS).unlink()
    (folder / dflash.INDEX).unlink()
    names = {name: f"{stem}-0000{place % 2 + 1}-of-00002.safetensors" for place, name in enumerate(tensors)}
    for file in set(names.values()):
        samples.save_file(folder / file, {prefix + n: tensors[n] for n in tensors if names[n] == file})
    placed = {prefix + name: file for name, file in names.items()}
    (folder / index).write_text(json.dumps({"weight_map": placed}))
    return placed


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("stem", ["dflash_draft_model", "model"])
def test_sharded_with_index(stem: str, prefix: str, folder: Path) -> None:
    """Shards under either published name, prefixed or not, give the same parameters as one file."""
    _, params = read_drafter(folder)
    shard(folder, stem, f"{stem}.safetensors.index.json", prefix)
    assert_same(read_drafter(folder)[1], params)


def test_index_must_agree_with_its_shards(folder: Path) -> None:
    """A tensor that the index puts elsewhere, a file it does not name and shards without it are errors."""
    index = folder / "model.safetensors.index.json"
    placed = shard(folder, "model", index.name)
    first, *_, last = sorted(set(placed.values()))
    index.write_text(
        json.dumps({"weight_map": placed | {"fc.weight": last if placed["fc.weight"] == first else first}})
    )
    with pytest.raises(UserError, match=r"disagrees with the files about 'fc.weight'"):
        read_drafter(folder)
    index.write_text(json.dumps({"weight_map": {name: file for name, file in placed.items() if file == first}}))
    with pytest.raises(UserError, match=f"{last}: not named by"):
        read_drafter(folder)
    index.unlink()
    with pytest.raises(UserError, match=f"found {first!r}, {last!r}"):
        read_drafter(folder)


def renamed(tensors: samples.Tensors, old: str, new: str) -> samples.Tensors:
    return {new if name == old else name: tensor for name, tensor in tensors.items()}


def added(tensors: samples.Tensors, name: str) -> samples.Tensors:
    return {**tensors, name: ("BF16", np.zeros((2, 16), ml_dtypes.bfloat16))}


BAD_TENSORS = {
    "missing": (lambda t: {n: x for n, x in t.items() if "q_norm" not in n}, r"missing 'layers.0.self_attn.q_norm"),
    "no first": (lambda t: renamed(t, "fc.weight", "fc.weights"), "missing 'fc.weight'"),
    "embedding": (lambda t: added(t, "embed_tokens.weight"), "unexpected 'embed_tokens.weight'"),
    "head": (lambda t: added(t, "lm_head.weight"), "unexpected 'lm_head.weight'"),
    "twice": (lambda t: added(t, "model.norm.weight"), "'norm.weight' is there twice"),
    "shape": (
        lambda t: t | {"norm.weight": ("BF16", np.zeros(15, ml_dtypes.bfloat16))},
        r"'norm.weight' has shape \[15\]; the config needs \[16\]",
    ),
    "one dtype": (lambda t: t | {"norm.weight": ("F32", np.zeros(16, np.float32))}, "is F32; expected BF16"),
    "all dtypes": (lambda t: t | {"fc.weight": ("U8", np.zeros((16, 32), np.uint8))}, "is U8; expected BF16 or F32"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_every_tensor_is_used_exactly_once(case: str, folder: Path) -> None:
    """A missing, surplus, doubled, mis-shaped or mistyped tensor is an error naming it, found and expected."""
    change, message = BAD_TENSORS[case]
    replace_tensors(folder, change(held_tensors(folder / dflash.TENSORS)))
    with pytest.raises(UserError, match=message):
        read_drafter(folder)


def test_sinks_follow_the_config(folder: Path) -> None:
    """With `attention_sink_bias` false the sinks must be absent; with it true they must be there."""
    edit_config(folder, attention_sink_bias=False)
    with pytest.raises(UserError, match=r"unexpected 'layers.0.self_attn.attention_sink_bias'"):
        read_drafter(folder)
    replace_tensors(folder, {n: x for n, x in held_tensors(folder / dflash.TENSORS).items() if "sink" not in n})
    config, params = read_drafter(folder)
    assert not config.has_sink and "sink" not in params["layers_0"]["attention"]
    edit_config(folder, attention_sink_bias=True)
    with pytest.raises(UserError, match=r"missing 'layers.0.self_attn.attention_sink_bias'"):
        read_drafter(folder)


def test_vocabulary_is_the_drafters_own(folder: Path) -> None:
    """The vocabulary that is proposed comes from the drafter's config; the mask's id may lie beyond it."""
    config, _ = read_drafter(folder)
    assert config.vocab_size == 48 and config.mask_token_id == 50


def test_config_of_billions_of_layers_is_refused_at_once(folder: Path) -> None:
    """A config that asks for more tensors than could exist costs nothing."""
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 2**30}))
    with pytest.raises(UserError, match=r"missing 'layers.2.*and more"):
        read_drafter(folder)


def test_has_drafter(folder: Path) -> None:
    """A checkpoint directory has a drafter when its `dflash/` has a config."""
    assert has_drafter(folder.parent) and not has_drafter(folder)


def test_half_written_folder_never_appears(tmp_path, monkeypatch) -> None:
    """A failure at any file leaves no folder, an existing folder is left as it is, and a next attempt succeeds."""
    params = random_params(SMALL)
    writes = 0

    def failing(self, name, array) -> None:
        nonlocal writes
        writes += 1
        if writes == 5:
            raise OSError(28, "No space left on device")
        original(self, name, array)

    original = dflash.TensorFileWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(dflash.TensorFileWriter, "write", failing)
        with pytest.raises(UserError, match=r"dflash: could not be written \(No space"):
            write_drafter(tmp_path / "dflash", SMALL, params)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"differ in mask"):
        write_drafter(tmp_path / "dflash", SMALL, {name: leaf for name, leaf in params.items() if name != "mask"})
    assert list(tmp_path.iterdir()) == []
    write_drafter(tmp_path / "dflash", SMALL, params)
    with pytest.raises(UserError, match="already exists"):
        write_drafter(tmp_path / "dflash", SMALL, random_params(SMALL, seed=1))
    assert_same(read_drafter(tmp_path / "dflash")[1], params)


def test_mutated_folders_are_read_or_refused(tmp_path) -> None:
    """Whatever happens to the bytes of a file, the folder is read or refused with one short `UserError`."""
    folder = tmp_path / "dflash"
    write_drafter(folder, small(**EXTRAS), random_params(small(**EXTRAS)))
    originals = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    accepted = 0
    for case in range(600):
        rng = random.Random(case)
        name = sorted(originals)[case % len(originals)]
        change = mutate_bytes(rng, originals[name]) if name.endswith(".pt") else mutate(rng, name, originals[name])
        (folder / name).write_bytes(change)
        try:
            read_drafter(folder)
            accepted += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 4000
        (folder / name).write_bytes(originals[name])
    assert 0 < accepted < 600
