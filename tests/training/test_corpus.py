"""The corpus: reproducible, deduplicated, and split so that held-out text is unseen text."""

import hashlib
import json

import numpy as np
import pytest

from mimo_jax.errors import UserError
from mimo_jax.files import exclusive, write_atomically
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training import corpus
from mimo_jax.training.corpus import check_same_tokenizer


def module(package: int, index: int) -> str:
    lines = [f"def function_{package}_{index}_{'abc'[line % 3] * (line + 1)}(items):" for line in range(9)]
    return "\n    return sum(items)\n\n\n".join(lines) + "\n    return items\n"


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "source"
    for package in range(60):
        for index in range(2):
            path = folder / f"package{package}" / f"module{index}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(module(package, index))
    (folder / "package0" / "copy.py").write_text(module(1, 1))
    (folder / "package0" / "tests").mkdir()
    (folder / "package0" / "tests" / "test_it.py").write_text(module(99, 0))
    (folder / "package0" / "table.py").write_text("DATA = [" + "123456789, " * 30 + "]\n")
    (folder / "package0" / "latin.py").write_bytes(module(98, 0).encode() + b"# \xe9\n")
    return folder


@pytest.fixture
def built(root, tmp_path):
    out = tmp_path / "corpus"
    return corpus.build(out, [root], vocab_size=300, tokenizer_bytes=100_000), out


def test_no_package_is_in_both_splits(built):
    """Held-out files share no package with training files, and both splits have some."""
    manifest, _ = built
    packages = manifest["packages"]
    assert packages["train"] and packages["heldout"]
    assert not set(packages["train"]) & set(packages["heldout"])


def test_each_content_once_and_only_code(root, built):
    """Copies, tests, number tables and files that are no UTF-8 stay out."""
    manifest, _ = built
    paths = [path for _, path, _, _ in manifest["files"]]
    hashes = [digest for *_, digest in manifest["files"]]
    assert len(set(hashes)) == len(hashes) == 120
    assert ("package0/copy.py" in paths) != ("package1/module1.py" in paths)
    assert not any(name in path for path in paths for name in ("test_it", "table", "latin"))


def test_manifest_says_exactly_what_went_in(root, built):
    """Every file's hash and size are those of the file, and the token files hold what the manifest counts."""
    manifest, out = built
    for split, path, size, digest in manifest["files"]:
        data = (root / path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest and len(data) == size
        assert split in corpus.SPLITS
    assert json.loads((out / "manifest.json").read_text()) == manifest
    for split in corpus.SPLITS:
        assert len(corpus.load_tokens(out, split)) == manifest["tokens"][split]


def test_the_same_files_give_the_same_bytes(root, tmp_path, built):
    """Building twice writes identical tokenizer, tokens and manifest."""
    _, out = built
    corpus.build(tmp_path / "again", [root], vocab_size=300, tokenizer_bytes=100_000)
    for name in ("tokenizer.json", "train.bin", "heldout.bin", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_a_finished_tokenizer_is_used_as_it_is(root, tmp_path, built):
    """Going on from a checkpoint, the corpus is cut by that checkpoint's tokenizer, not by a new one."""
    _, out = built
    again = tmp_path / "again"
    small = corpus.build(again, [root], vocab_size=280, tokenizer_bytes=100_000)
    given = Tokenizer.load(out / "tokenizer.json")
    manifest = corpus.build(again, [root], vocab_size=280, tokenizer_bytes=100_000, tokenizer=given)
    assert (again / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert manifest["vocab_size"] == 300 and small["vocab_size"] == 280


def test_a_tokenizer_is_the_same_however_its_file_is_spelled(built, tmp_path):
    """A checkpoint of other writers fits the corpus that its tokenizer cut; one with another tokenizer does not."""
    _, out = built
    values = json.loads((out / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | {"padding": None}))
    check_same_tokenizer(tmp_path, out)
    Tokenizer.train(["other text"], 300).save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="differs from"):
        check_same_tokenizer(tmp_path, out)
    with pytest.raises(UserError, match="nowhere"):
        check_same_tokenizer(tmp_path / "nowhere", out)


def test_tokens_decode_to_the_files(root, built):
    """The token file is the files' text, each ended by the end-of-text token."""
    manifest, out = built
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    end = tokenizer.id_of("<|endoftext|>")
    tokens = np.asarray(corpus.load_tokens(out, "heldout"))
    first = tokens[: list(tokens).index(end)]
    path = next(path for split, path, _, _ in manifest["files"] if split == "heldout")
    assert tokenizer.decode(first.tolist()) == (root / path).read_text()


def test_batches_depend_on_seed_and_step_alone():
    """Any step's batch can be made on its own; an epoch shows every window once, and another seed another order."""
    tokens = np.arange(1001, dtype=np.uint16)
    steps = [corpus.batch_at(tokens, step, batch=4, length=10, seed=3) for step in range(50)]
    np.testing.assert_array_equal(corpus.batch_at(tokens, 17, 4, 10, 3), steps[17])
    assert steps[0].shape == (4, 11) and steps[0].dtype == np.int32
    for epoch in (steps[:25], steps[25:]):
        starts = sorted(int(row[0]) for step in epoch for row in step)
        assert starts == list(range(0, 1000, 10))
    assert any((one != two).any() for one, two in zip(steps[:25], steps[25:]))
    assert (corpus.batch_at(tokens, 17, 4, 10, 4) != steps[17]).any()


class Killed(Exception):
    """Stands for the process being gone."""


@pytest.mark.parametrize("written", range(4))
def test_a_killed_rebuild_is_the_old_corpus_or_is_noticed(root, built, monkeypatch, written):
    """Tokens of one build are never read beside the tokenizer of another, and building again mends it."""
    _, out = built
    before = {split: np.array(corpus.load_tokens(out, split)) for split in corpus.SPLITS}
    writes = iter(range(4))

    def dying(path, data):
        if next(writes) == written:
            raise Killed
        write_atomically(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_atomically", dying)
        with pytest.raises(Killed):
            corpus.build(out, [root], vocab_size=280, tokenizer_bytes=100_000)
    if written == 0:
        for split in corpus.SPLITS:
            np.testing.assert_array_equal(corpus.load_tokens(out, split), before[split])
    else:
        with pytest.raises(UserError, match=r"not the one that manifest.json lists.*build it again"):
            for split in corpus.SPLITS:
                corpus.load_tokens(out, split)
    manifest = corpus.build(out, [root], vocab_size=280, tokenizer_bytes=100_000)
    assert [len(corpus.load_tokens(out, split)) for split in corpus.SPLITS] == list(manifest["tokens"].values())
    assert sorted(path.name for path in out.iterdir()) == [
        "heldout.bin",
        "manifest.json",
        "tokenizer.json",
        "train.bin",
    ]


@pytest.mark.parametrize("name", ["train.bin", "tokenizer.json"])
def test_a_changed_file_of_a_corpus_is_noticed(built, name):
    """A flipped bit of tokens or tokenizer is named."""
    _, out = built
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: not the one that manifest.json lists"):
        corpus.load_tokens(out, "train")


def test_a_corpus_has_one_builder(root, built):
    """A second build into the same folder ends with one line, and what is there stays."""
    _, out = built
    with exclusive(out / ".lock", "held"):
        with pytest.raises(UserError, match="another process is building this corpus"):
            corpus.build(out, [root], vocab_size=280, tokenizer_bytes=100_000)
    assert Tokenizer.load(out / "tokenizer.json").vocab_size == 300


def test_too_little_text_is_an_error(tmp_path):
    """An empty folder, a missing corpus and a batch larger than the corpus are one-line errors."""
    with pytest.raises(UserError, match="both splits need some"):
        corpus.build(tmp_path / "out", [tmp_path], 300, 1000)
    with pytest.raises(UserError, match=r"train\.bin: not found; build it with"):
        corpus.load_tokens(tmp_path, "train")
    with pytest.raises(UserError, match="100 tokens give 9 windows of 10; a batch needs 16"):
        corpus.batch_at(np.zeros(100, np.uint16), 0, batch=16, length=10, seed=0)
