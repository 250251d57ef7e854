"""What a manifest or a folder says is checked before anything is done with it."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

import mimo_jax as mimo
from mimo_jax.checkpoint import manifest
from mimo_jax.checkpoint.convert import to_huggingface, to_orbax, verify
from mimo_jax.checkpoint.dflash import attach_drafter, read_drafter
from mimo_jax.checkpoint.manifest import read_manifest, write_manifest
from mimo_jax.checkpoint.orbax import leaf_digests
from mimo_jax.checkpoint.read import read
from mimo_jax.errors import UserError


def bundled(folder: Path) -> Path:
    return Path(shutil.copytree(mimo.BUNDLED, folder))


def written(folder: Path) -> Path:
    """The least that has a manifest of ours."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_manifest(folder, "huggingface", {}, lambda nbytes: None)
    return folder


def forge(directory: Path, **changes) -> None:
    """Changes tables of a manifest, with the digest that an attacker would compute."""
    values = json.loads((directory / "manifest.json").read_text())
    del values["sha256"]
    values |= {key: {**values[key], **change} for key, change in changes.items()}
    body = json.dumps(values, indent=1, sort_keys=True)
    values["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(values, indent=1, sort_keys=True))


def test_a_forged_manifest_passes_its_own_digest(tmp_path) -> None:
    """`forge` does what the tests below need: the digest alone refuses nothing."""
    forge(written(tmp_path / "ck"), tensors={"x": "0" * 64})
    assert read_manifest(tmp_path / "ck")["tensors"]["x"] == "0" * 64


NAMES = ("/etc/passwd", "../x", "a/../../x", "a/./x", "a//x", "", "a\\x", "a\nx", "a\0x", "x" * 300, "manifest.json")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_plain_paths_are_refused(tmp_path, name: str) -> None:
    """A manifest cannot name a place outside its directory, or one place in two ways."""
    forge(written(tmp_path / "ck"), files={name: {"bytes": 1, "sha256": "0" * 64}})
    for reader in (verify, lambda folder: attach_drafter(folder, *read_drafter(mimo.BUNDLED / "dflash"))):
        with pytest.raises(UserError, match="is not a plain path inside the directory"):
            reader(tmp_path / "ck")


@pytest.mark.parametrize("entry", [3, {}, {"bytes": True, "sha256": "0" * 64}, {"bytes": 1, "sha256": "0"}])
def test_entries_of_another_form_are_refused(tmp_path, entry) -> None:
    """Every file has a size and a SHA-256, and every tensor a SHA-256."""
    forge(written(tmp_path / "ck"), files={"config.json": entry})
    with pytest.raises(UserError, match=r"'config.json' must have bytes and sha256"):
        verify(tmp_path / "ck")
    forge(tmp_path / "ck", files={"config.json": {"bytes": 1, "sha256": "0" * 64}}, tensors={"x": entry})
    with pytest.raises(UserError, match="tensors: 'x' must have a SHA-256"):
        verify(tmp_path / "ck")


def test_nothing_is_parsed_before_size_and_digest_are_right(tmp_path, monkeypatch) -> None:
    """A manifest that is out of proportion to its folder, or that something has damaged, costs no memory."""
    monkeypatch.setattr(manifest, "load_json", lambda *_: pytest.fail("parsed"))
    (tmp_path / "manifest.json").write_text('{"a":[' + "{}," * 300_000 + "{}]}")
    with pytest.raises(UserError, match="damaged"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"a":[' + "{}," * 3_000_000 + "{}]}")
    with pytest.raises(UserError, match=r"bytes; at most 2000000 were expected"):
        read_manifest(tmp_path)


def not_ours(folder: Path) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "My PWA"}')


def with_a_thesis(folder: Path) -> None:
    (written(folder) / "thesis.tex").write_text("years")


def with_a_folder(folder: Path) -> None:
    (written(folder) / "notes").mkdir()
    (folder / "notes" / "thesis.tex").write_text("years")


def with_a_link(folder: Path) -> None:
    (written(folder) / "link").symlink_to("..")


def damaged(folder: Path) -> None:
    path = written(folder) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"huggingface", b"huggingfacf"))


@pytest.mark.parametrize("make", [not_ours, with_a_thesis, with_a_folder, with_a_link, damaged])
def test_overwrite_replaces_only_what_a_manifest_lists(tmp_path, make) -> None:
    """A folder that somebody else wrote, or put something into, is kept as it is, whatever it has of a manifest."""
    make(tmp_path / "mine")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for writer in (
        lambda: to_orbax(mimo.BUNDLED, tmp_path / "mine", overwrite=True),
        lambda: to_huggingface(mimo.BUNDLED, tmp_path / "mine", overwrite=True),
        lambda: attach_drafter(tmp_path / "mine", *read_drafter(mimo.BUNDLED / "dflash")),
    ):
        with pytest.raises(UserError, match="mine: not replaced, as"):
            writer()
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "dflash/config.json", "dflash"])
def test_links_out_of_the_source_are_not_followed(tmp_path, name: str) -> None:
    """What a hostile checkpoint links to does not end up in what is made of it."""
    source, secret = bundled(tmp_path / "ck"), tmp_path / "secret"
    (source / "manifest.json").unlink()
    if name == "dflash":
        (source / name).rename(secret)
    else:
        secret.write_text("{}")
        (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    for convert in (to_orbax, to_huggingface):
        with pytest.raises(UserError, match="a link out of the directory"):
            convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "secret"]


def cached(repository: Path, source: Path) -> Path:
    """`source` as the Hugging Face cache holds it."""
    snapshot = repository / "snapshots" / "c0ffee"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(source.rglob("*")) if path.is_file()):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, repository / "blobs" / str(number))
        link.symlink_to(Path(*[".."] * len(link.relative_to(repository).parts[:-1]), "blobs", str(number)))
    return snapshot


def test_a_hugging_face_cache_opens(tmp_path) -> None:
    """Links into the blobs of the same repository are what a download leaves: it loads, verifies and converts."""
    snapshot = cached(tmp_path / "models--a", mimo.BUNDLED)
    assert leaf_digests(read(snapshot).params) == leaf_digests(read(mimo.BUNDLED).params)
    assert read_drafter(snapshot / "dflash")[0] == read_drafter(mimo.BUNDLED / "dflash")[0]
    assert mimo.load(snapshot, draft="dflash", verify=True).drafter.block_size == 8
    to_orbax(snapshot, tmp_path / "orbax")
    for path in (tmp_path / "orbax").rglob("*"):
        assert not path.is_symlink()
    orbax_snapshot = cached(tmp_path / "models--b", tmp_path / "orbax")
    assert leaf_digests(read(orbax_snapshot).params) == leaf_digests(read(mimo.BUNDLED).params)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00001.safetensors", "dflash/config.json"])
def test_a_hugging_face_cache_does_not_reach_other_repositories(tmp_path, name: str) -> None:
    """A snapshot's link to another repository's blobs, or through the blobs to elsewhere, is refused."""
    snapshot = cached(tmp_path / "models--a", mimo.BUNDLED)
    blob = (snapshot / name).resolve()
    (tmp_path / "models--b" / "blobs").mkdir(parents=True)
    elsewhere = tmp_path / "models--b" / "blobs" / "0"
    blob.rename(elsewhere)
    for link in (snapshot / name, blob):
        link.unlink(missing_ok=True)
        link.symlink_to(elsewhere)
        with pytest.raises(UserError, match="a link out of the directory"):
            read(snapshot)
            read_drafter(snapshot / "dflash")
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(blob)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damage_does_not_get_a_new_manifest(tmp_path) -> None:
    """A source that differs from its manifest is neither converted nor given a drafter: what came out would verify."""
    source = bundled(tmp_path / "ck")
    flip(source / "model-00001-of-00001.safetensors")
    config, params = read_drafter(mimo.BUNDLED / "dflash")
    for work in (
        lambda: to_orbax(source, tmp_path / "out"),
        lambda: to_huggingface(source, tmp_path / "out"),
        lambda: attach_drafter(source, dataclasses.replace(config, acceptance_length=1.0), params),
    ):
        with pytest.raises(UserError, match=r"model-00001-of-00001.safetensors: damaged"):
            work()
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_load_checks_everything_when_asked(tmp_path) -> None:
    """`verify=True` finds a flipped bit among the weights, which loading alone does not see."""
    folder = bundled(tmp_path / "ck")
    mimo.load(folder, draft="none", verify=True)
    flip(folder / "model-00001-of-00001.safetensors")
    mimo.load(folder, draft="none")
    with pytest.raises(UserError, match=r"model-00001-of-00001.safetensors: damaged"):
        mimo.load(folder, draft="none", verify=True)
