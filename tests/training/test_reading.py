"""Pictures of code: what they are said to hold is what they hold; stages learn, and leave alone what they must."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import mimo_jax as mimo
from mimo_jax.checkpoint.export import write_checkpoint
from mimo_jax.checkpoint.huggingface import read_hf_config
from mimo_jax.config.towers import VisionConfig
from mimo_jax.errors import UserError
from mimo_jax.evaluation.reading import Told, accuracy, distance
from mimo_jax.loading import load
from mimo_jax.modeling.backbone import init_params
from mimo_jax.tokenizer import END_OF_TEXT, Tokenizer
from mimo_jax.training import corpus
from mimo_jax.training.ahead import Ahead
from mimo_jax.training.export import extra_files
from mimo_jax.training.launch import Launch
from mimo_jax.training.reading import launch as stages
from mimo_jax.training.reading.characters import CharacterConfig, character_step, init_characters
from mimo_jax.training.reading.copying import (
    LEARNING,
    CopyConfig,
    copy_step,
    init_copying,
    layouts,
    learning,
    merged,
    transcripts,
)
from mimo_jax.training.reading.copying import lesson as copying_lesson
from mimo_jax.training.reading.examples import SIZES, Reader, batches, examples, labels_in, spelled
from mimo_jax.training.reading.fonts import FONTS, HELD_OUT, TRAINED, font_file
from mimo_jax.training.reading.joining import JoinConfig, slipped
from mimo_jax.training.reading.pictures import LEAST_PITCH, Grid, draw
from mimo_jax.training.reading.rows import SILENT, Voice, said, transcript
from mimo_jax.training.reading.snippets import CHARACTERS, snippet
from tests.checkpoint.samples import load_file, small

ROOT = Path(mimo.__file__).parent
TOKENIZER = Tokenizer.load(mimo.BUNDLED / "tokenizer.json")
TEXT = "".join(path.read_text() for path in sorted((ROOT / "decode").glob("*.py")))
TOKENS = np.array(TOKENIZER.encode(TEXT, literal=True), np.uint16)
INSTALLED = [name for name, font in FONTS.items() if importlib.util.find_spec(font.package)]
CONFIG = stages.seeing(small(vocab_size=4096), TOKENIZER)
TINY = VisionConfig(64, (0, 1, -1), 32, 48, num_heads=4, num_kv_heads=2, head_dim=8, patch=8, window=16, init_range=0.1)


def reader(vision: VisionConfig = TINY) -> Reader:
    assert CONFIG.media is not None
    files = tuple(font_file(name) for name in INSTALLED if name in TRAINED)
    return Reader(TOKENS, TOKENIZER, files, vision, CONFIG.media)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_the_same_whoever_draws_them(workers):
    """Drawn ahead in other processes, a step gets the batch that it would have drawn itself."""
    train = CharacterConfig(3, tokens=64, seed=3)
    make = partial(stages.character_batch, reader(), train)
    drawn = Ahead(make, workers)
    for step in (1, 2, 3):
        jax.tree.map(np.testing.assert_array_equal, drawn(step), make(step))


@pytest.mark.parametrize("name", INSTALLED)
def test_labels_spell_the_picture(name):
    """In every font that is here, at any size and margin: each character in a slot of its own, line after line."""
    found = dataclasses.replace(reader(), fonts=(font_file(name),))
    for example in itertools.islice(examples(found, np.random.default_rng(0), 128), 40):
        told = spelled(example.labels_RN, example.columns // TINY.merge)
        text = TOKENIZER.decode(list(example.ids))
        assert told == "\n".join(line for line in text.split("\n") if line)  # empty lines have no slot


def test_labels_lie_where_ink_is():
    """Of a picture of dots in the first and third line, the darkest tokens are those that labels name."""
    rng = np.random.default_rng(1)
    picture = draw(["#  #", "", " ##"], font_file("DejaVu Sans Mono Bold"), rng, size=16)
    height, width, _ = picture.pixels_HW3.shape
    rows, columns = height // 16, width // 16
    labels_RN = labels_in(picture, rows, columns)
    ground = np.median(picture.pixels_HW3, axis=(0, 1))
    differs = np.abs(picture.pixels_HW3 - ground).mean(axis=2)
    cells = differs[: rows * 16, : columns * 16].reshape(rows, 16, columns, 16).mean(axis=(1, 3)).ravel()
    inked = (labels_RN == 1 + CHARACTERS.index("#")).any(axis=1)
    assert cells[inked].min() > 2 * np.median(cells[~inked])
    assert picture.grid.pitch >= LEAST_PITCH


def test_rows_say_all_the_text_in_order():
    """Drawn or not: read row by row, what is said is lines of the corpus; rows say several tokens, one or none."""
    known = {line.strip() for line in TEXT.expandtabs(4).split("\n")}
    drawn = (each.said_RN for each in examples(reader(), np.random.default_rng(0), 128))
    for found_RN in itertools.chain(
        itertools.islice(drawn, 40), itertools.islice(layouts(reader(), np.random.default_rng(0), 128), 40)
    ):
        is_said_RN = found_RN != SILENT
        assert (is_said_RN[:, :-1] >= is_said_RN[:, 1:]).all()
        for line in TOKENIZER.decode(list(transcript(found_RN))).split("\n"):
            assert any(one.startswith(line.strip()) for one in known)
    assert is_said_RN.any(axis=1).mean() < 1 and is_said_RN[:, 1].any()


def test_a_row_says_what_its_square_shows():
    """Squares of 16 pixels, characters of 8, two in each; the end of a line is right of its last one."""
    grid = Grid(left=0, top=0, advance=8, pitch=32, width=64, height=64)
    found = said(["selfx7", "d"], TOKENIZER, grid, rows=4, columns=4)
    assert found is not None
    # Lines have their centres in the second and the last row of squares; the first ends in its last square.
    shown = ["", "", "", "", "se", "lf", "x7", "\n", "", "", "", "", "d", "", "", ""]
    assert [TOKENIZER.decode(row[row != SILENT].tolist()) for row in found] == shown
    assert found[6].tolist() == [TOKENIZER.id_of("x"), TOKENIZER.id_of("7"), SILENT]
    assert said(["zqxj"], TOKENIZER, dataclasses.replace(grid, pitch=16, height=16), rows=1, columns=1) is None


def test_what_rows_say_is_heard():
    """Exactly each row's tokens, as loud as it says them, if embeddings are at right angles; nothing of silent rows."""
    embed_CD = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0] * np.arange(1, 9)[:, None]
    voice = Voice.of(embed_CD, placeholder=7)
    rows = voice.rows(np.array([[[3, SILENT], [SILENT, SILENT], [0, 6]]]), np.array([1.0, 0.5]))
    expected = np.eye(8)[3], np.zeros(8), np.eye(8)[0] + 0.5 * np.eye(8)[6]
    np.testing.assert_allclose(voice.heard(rows)[0], expected, atol=1e-6)
    norms = np.linalg.norm(voice.embed_CD, axis=1)
    np.testing.assert_allclose(norms, np.sqrt((embed_CD**2).sum(axis=1).mean()), rtol=1e-6)
    np.testing.assert_allclose(rows[0, 1], voice.embed_CD[7], rtol=1e-6)


def test_snippets_are_code_as_it_stands():
    """They fit, are printable, begin at the margin, and every line is one of the corpus, but for its indentation."""
    rng, known = np.random.default_rng(0), [line.strip() for line in TEXT.expandtabs(4).split("\n")]
    for _ in range(50):
        lines = snippet(TOKENS, TOKENIZER, rng, SIZES[256])
        assert 1 <= len(lines) <= 12 and all(len(line) <= 40 and set(line) <= set(CHARACTERS) for line in lines)
        assert any(line and not line.startswith(" ") for line in lines)
        assert all(any(one.startswith(line.strip()) for one in known) for line in lines)


def test_a_batch_depends_on_seed_and_step_alone():
    """So a run that is killed goes on with the same pictures."""
    first = list(itertools.islice(batches(reader(), 256, seed=3), 3))
    again, _ = next(batches(reader(), 256, seed=3, first=2))
    for one, other in zip(jax.tree.leaves(first[2][0]), jax.tree.leaves(again)):
        np.testing.assert_array_equal(one, other)
    assert first[0][0].patches_BSP.shape[0] * first[0][0].labels_BRN.shape[1] == 256


def test_the_tower_learns_a_batch():
    """From one batch alone: most of its characters and of its tokens within some steps."""
    train = CharacterConfig(80, 256, 1e-2, warmup=5, decay_share=0)
    batch, _ = next(batches(reader(), 64, seed=0))
    voice = Voice.of(np.random.default_rng(0).normal(size=(4096, TINY.out_size)), 0)
    state, found = init_characters(TINY, train), []
    for _ in range(80):
        state, metrics = character_step(state, batch, voice, TINY, train)
        found.append((float(metrics["spelled"]), float(metrics["right"])))
    assert max(found[0]) < 0.1 and min(found[-1]) > 0.5


def test_the_text_model_learns_to_copy():
    """One lesson again and again: its text is told ever better, and nothing but attention and norms has changed."""
    config, train = dataclasses.replace(CONFIG, dtype="float32"), CopyConfig(40, 256, 1, 32, 3e-2, 2, faithful=0.1)
    text = init_params(config, jax.random.key(0))
    text.pop("mtp", None)
    voice = Voice.of(text["embed"], 0)
    own = copying_lesson(config, reader(), train, lambda step: np.zeros((1, 32), np.int32), 0)
    state, losses = init_copying(text, train), []
    for _ in range(40):
        state, metrics = copy_step(state, text, own, voice, config, train)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5 and float(metrics["divergence"]) > 0
    assert all(set(layer) <= set(LEARNING) for layer in learning(text).values())
    after = merged(text, state.params)
    assert after["embed"] is text["embed"] and after["layers_1"]["moe"] is text["layers_1"]["moe"]


def test_a_transcript_is_the_prompt_and_then_the_text():
    """Ids as `media.prompt` makes them of an image, the text's tokens and the end; only the latter are told."""
    batch, found = next(batches(reader(), 256, seed=0))
    size, end = batch.size, TOKENIZER.id_of(END_OF_TEXT)
    told = transcripts([each.ids for each in found], [each.count for each in found], size, CONFIG, end)
    assert CONFIG.media is not None
    for place, example in enumerate(found):
        own = told.tokens_BT[place, told.is_told_BT[place]]
        assert tuple(own[:-1]) == example.ids and own[-1] == end
        shown = told.tokens_BT[place, : 2 + example.count]
        rows = 4096 + place * size + np.arange(example.count)
        np.testing.assert_array_equal(shown, [CONFIG.media.vision_start, *rows, CONFIG.media.vision_end])


def test_slips_are_shown_but_not_told():
    """About as many as asked for, none among what is not told; what is to be told stays."""
    ids = [list(range(10, 110)), list(range(200, 320))]
    told = transcripts(ids, [3, 5], 256, CONFIG, TOKENIZER.id_of(END_OF_TEXT))
    found = slipped(told, 0.25, np.random.default_rng(0))
    is_other_BT = found.shown_BT != told.shown_BT
    assert not is_other_BT[~told.is_told_BT].any()
    assert 0.15 < is_other_BT[told.is_told_BT].mean() < 0.35
    np.testing.assert_array_equal(found.tokens_BT, told.tokens_BT)
    np.testing.assert_array_equal(slipped(told, 0, np.random.default_rng(0)).shown_BT, told.shown_BT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small checkpoint; the same after two steps of copying; and with a tower of two steps of each stage."""
    folder = tmp_path_factory.mktemp("reading")
    source = folder / "code" / "package"
    source.mkdir(parents=True)
    for path in (ROOT / "decode").glob("*.py"):
        (source / path.name).write_bytes(path.read_bytes())
        (folder / "code" / path.name).write_bytes(path.read_bytes() + b"\n")
    corpus.build(folder / "corpus", [folder / "code"], 4096, 1, TOKENIZER)
    config = small(vocab_size=4096)
    start, tokenizer_json = folder / "start", (mimo.BUNDLED / "tokenizer.json").read_bytes()
    params = init_params(config, jax.random.key(0))
    write_checkpoint(start, config, params, extra_files(config, TOKENIZER, tokenizer_json))
    launch = Launch(folder / "copied", folder / "corpus", 2)
    whole, blocks = stages.seeing, (0, -1)

    def smaller(config, tokenizer):
        found = whole(config, tokenizer)
        return dataclasses.replace(found, vision=dataclasses.replace(found.vision, windows=blocks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "seeing", smaller)
        patch.setattr(stages, "TRAINED", tuple(name for name in INSTALLED if name in TRAINED))
        for size in (128, 256):  # so that each stage is one program
            patch.delitem(SIZES, size)
        stages.train_copying(launch, start, CopyConfig(2, 256, 1, 32))
        stages.export_copying(folder / "copied", start, folder / "begun")
        launch = dataclasses.replace(launch, run=folder / "faithful")
        stages.train_copying(launch, start, CopyConfig(2, 256, 1, 32), folder / "begun")
        stages.export_copying(folder / "faithful", start, folder / "copying")
        launch = dataclasses.replace(launch, run=folder / "characters")
        stages.train_characters(launch, folder / "copying", None, CharacterConfig(2, 256))
        launch = dataclasses.replace(launch, run=folder / "joined")
        stages.export_characters(folder / "characters", folder / "copying", folder / "apart")
        stages.train_join(launch, start, folder / "apart", None, JoinConfig(2, 256, 1, 32))
        stages.export_seeing(folder / "joined", start, folder / "seeing")
        launch = dataclasses.replace(launch, run=folder / "more")
        stages.train_characters(launch, folder / "copying", None, CharacterConfig(2, 256), folder / "seeing")
        with pytest.raises(UserError, match="has no vision tower to go on from"):
            launch = dataclasses.replace(launch, run=folder / "none")
            stages.train_characters(launch, folder / "copying", None, CharacterConfig(2, 256), start)
    return start, folder / "copying", folder / "apart", folder / "seeing"


def test_stages_leave_alone_what_is_not_theirs(trained):
    """Copying and joining change attention and norms in the file, a tower alone nothing: bit for bit."""
    start, copying, apart, seeing = (
        {name: held for file in folder.glob("*.safetensors") for name, held in load_file(file).items()}
        for folder in trained
    )
    for before, after in ((start, copying), (copying, seeing)):
        changed = {name for name in before if before[name] != after[name]}
        assert changed and all("self_attn" in name or "layernorm" in name for name in changed)
        assert not any("mtp" in name for name in changed)
    assert all(apart[name] == copying[name] for name in copying) and set(copying) == set(start)
    visual = {name for name in seeing if name.startswith("visual.")}
    assert set(seeing) - set(start) == set(apart) - set(start) == visual
    assert any(seeing[name] != apart[name] for name in visual)


def test_the_checkpoint_takes_pictures(trained, tmp_path):
    """`load` finds the tower; the library and the command line read the same picture; the model before has no tower."""
    start, _, _, seeing = trained
    model = load(seeing)
    assert model.towers is not None and read_hf_config(seeing)[0].vision is not None
    picture = draw(["x = 1"], font_file("DejaVu Sans Mono"), np.random.default_rng(0))
    file = tmp_path / "a.png"
    file.write_bytes(picture.png())
    result = mimo.generate(model, [mimo.Image(file)], mimo.Greedy(), max_tokens=3)
    command = [sys.executable, "scripts/generate.py", "--image", str(file), "--max-tokens", "3", "--temperature", "0"]
    done, refused = (
        subprocess.run([*command, "--model", str(folder)], cwd=ROOT.parent, capture_output=True, text=True)
        for folder in (seeing, start)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(result.text)
    assert json.loads(done.stdout.splitlines()[-1])["prompt_tokens"] == result.timing.prompt_tokens
    assert refused.returncode == 2 and f"{file}: this model takes no images" in refused.stderr


def test_fonts_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(FONTS, "Fira Code", dataclasses.replace(FONTS["Fira Code"], package="no_such_package"))
    with pytest.raises(UserError, match="font 'Fira Code': the package no_such_package is not installed; `make fonts`"):
        font_file("Fira Code", tmp_path)
    assert not set(HELD_OUT) & set(TRAINED)


def by_definition(one: str, other: str) -> int:
    if not one or not other:
        return len(one) + len(other)
    return min(
        by_definition(one[1:], other) + 1,
        by_definition(one, other[1:]) + 1,
        by_definition(one[1:], other[1:]) + (one[0] != other[0]),
    )


def test_errors_are_levenshteins_distance():
    """Against its definition, for random short strings."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        one, other = ("".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(2))
        assert distance(one, other) == by_definition(one, other)


def test_accuracy_counts_characters_not_pictures():
    """Two errors in 20 characters; the interval is that of a ratio over pictures."""
    told = [Told("f", "abcdefghij", "abcdefghij"), Told("f", "abcdefghij", "abXdefghi")]
    found = accuracy(told)
    assert found["accuracy"] == pytest.approx(0.9) and found["exact"] == 1 and found["characters"] == 20
    spread = np.std([0 - 1.0, 2 - 1.0], ddof=1) * np.sqrt(2) / 20
    assert found["interval"] == pytest.approx(1.96 * spread)
    assert json.dumps(found)
