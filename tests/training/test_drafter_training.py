"""Training of the drafter: what it is asked, what counts, and that it learns to be accepted."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.errors import UserError
from mimo_jax.generation import generate
from mimo_jax.loading import Model
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training import drafter, run, self_distillation
from mimo_jax.training.drafter import (
    DraftTrainConfig,
    Geometry,
    as_chain,
    draw_anchors,
    extended,
    loss_fn,
    position_weights,
)
from mimo_jax.training.self_distillation import DistillationConfig, Texts
from tests.tiny import random_params, tiny_config, tiny_drafter

TARGET = tiny_config(layer_pattern=(0, 1), moe_pattern=(0, 1), mtp_layers=0, init_range=0.15)
CONFIG = tiny_drafter(num_layers=1)
TRAIN = DraftTrainConfig(steps=20, batch=4, anchors=6)
SETTINGS = DistillationConfig(length=40, rows=6, shortest=2, longest=9, temperatures=(0.0, 1.0))
CORPUS = np.random.default_rng(0).integers(6, 256, 4000).astype(np.uint16)


TOKENIZER = Tokenizer.train(["def f(x):\n    return x\n"], 256 + 6)
MODEL = Model(TARGET, random_params(TARGET), TOKENIZER, (7,))
TEXTS = Texts(
    np.random.default_rng(1).integers(0, 256, (8, 40)).astype(np.uint16),
    np.arange(2, 10, dtype=np.int32),
    np.array([40, 40, 12, 30, 8, 40, 40, 11], np.int32),
)


def test_anchors_lie_in_what_the_target_wrote():
    """Anchors are distinct, and both their own token and the next one are the target's; too short rows say so."""
    texts = TEXTS
    for seed in range(30):
        anchors, drawn = draw_anchors(jax.random.key(seed), texts.starts, texts.ends, 40, 6)
        for row in range(8):
            chosen = np.asarray(anchors[row])[np.asarray(drawn[row])]
            assert len(set(chosen.tolist())) == len(chosen) == min(6, max(0, texts.ends[row] - 1 - texts.starts[row]))
            assert ((chosen >= texts.starts[row]) & (chosen < texts.ends[row] - 1)).all()


def test_position_weights_are_the_published_ones():
    """The decay of DFlash at gamma 4, and D-PACE's sum of products, position by position."""
    loss = np.array([[0.1, 2.0, 0.5, 1.0, 0.3, 0.2, 0.9]], np.float32)
    valid = np.array([[True] * 5 + [False] * 2])
    decay = np.asarray(position_weights("decay", loss, valid, 4.0))[0]
    np.testing.assert_allclose(decay, [1, 0.7788, 0.6065, 0.4724, 0.3679, 0, 0], atol=1e-4)
    smoothed = 0.5 * np.exp(-loss[0]) + 0.5
    expected = [sum(np.prod(smoothed[: m + 1]) for m in range(k, 5)) for k in range(5)]
    dpace = np.asarray(position_weights("dpace", loss, valid, 4.0))[0]
    np.testing.assert_allclose(dpace, [*expected, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("loss", drafter.LOSSES)
def test_nothing_behind_the_end_counts(loss):
    """Padding after a text changes neither loss nor gradient; what the target wrote does."""
    texts, train = TEXTS, dataclasses.replace(TRAIN, loss=loss)
    params = drafter.init_state(CONFIG, train).params

    @jax.jit
    def value(texts):
        return loss_fn(params, jax.random.key(0), MODEL.params, texts, TARGET, CONFIG, train)[0]

    padded, changed = texts.tokens.copy(), texts.tokens.copy()
    padded[2, 12:] = 99
    changed[2, 10] = (changed[2, 10] + 1) % 256  # not the last one: soft labels never look at it
    assert float(value(dataclasses.replace(texts, tokens=padded))) == pytest.approx(float(value(texts)), rel=1e-6)
    assert float(value(dataclasses.replace(texts, tokens=changed))) != pytest.approx(float(value(texts)), rel=1e-6)


def test_the_target_gets_no_gradient():
    """Features, embedding and head are frozen: no gradient reaches the target's parameters through the features."""
    texts = TEXTS
    params = drafter.init_state(CONFIG, TRAIN).params
    gradient = jax.grad(
        lambda weights: loss_fn(params, jax.random.key(0), weights, texts, TARGET, CONFIG, TRAIN)[0], allow_int=True
    )(MODEL.params)
    norms = {name: float(jnp.linalg.norm(gradient[name]["attention"]["o"])) for name in ("layers_0", "layers_1")}
    assert norms == {"layers_0": 0.0, "layers_1": 0.0}


def test_self_generated_text_is_the_targets(tmp_path):
    """Greedy chunks are the target's own continuations, sampled ones differ; a second call writes nothing anew."""
    model = MODEL
    texts = self_distillation.generate_texts(model, CORPUS, SETTINGS, tmp_path / "texts", 2)
    assert len(texts) == 12 and texts.tokens.shape == (12, 40)
    for row in range(3):
        prompt = texts.tokens[row, : texts.starts[row]].astype(int).tolist()
        written = texts.tokens[row, texts.starts[row] : texts.ends[row]].astype(int).tolist()
        assert generate(model, prompt, max_tokens=40 - len(prompt)).tokens == written
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "texts").iterdir())]
    again = self_distillation.generate_texts(model, CORPUS, SETTINGS, tmp_path / "texts", 2)
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "texts").iterdir())] == stamps
    np.testing.assert_array_equal(again.tokens, texts.tokens)


def test_texts_of_another_target_or_corpus_are_not_added(tmp_path):
    """A drafter learns from one target's texts: a folder of them takes no others, nor any whose origin it lost."""
    self_distillation.generate_texts(MODEL, CORPUS, SETTINGS, tmp_path, 1)
    other = dataclasses.replace(MODEL, params=jax.tree.map(lambda array: array + 1, MODEL.params))
    with pytest.raises(UserError, match=r"run\.json: weights="):
        self_distillation.generate_texts(other, CORPUS, SETTINGS, tmp_path, 2)
    with pytest.raises(UserError, match=r"run\.json: corpus="):
        self_distillation.generate_texts(MODEL, CORPUS[1:], SETTINGS, tmp_path, 2)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match=r"no run\.json"):
        self_distillation.generate_texts(MODEL, CORPUS, SETTINGS, tmp_path, 2)


def test_training_raises_what_is_accepted(tmp_path):
    """A drafter trained on the target's own greedy text is accepted far more often than an untrained one.

    Random weights are sure of nothing, so their distributions teach little of what is greedy: the text does.
    """
    model = MODEL
    greedy = dataclasses.replace(SETTINGS, temperatures=(0.0,), rows=64)
    texts = self_distillation.generate_texts(model, CORPUS[:400], greedy, tmp_path / "texts", 1)
    train = dataclasses.replace(TRAIN, steps=150, batch=16, anchors=12, peak_rate=1e-2, loss="dpace")
    state = drafter.init_state(CONFIG, train)
    untrained = jax.tree.map(jnp.copy, state.params)
    state = run.train_until(
        prepared(tmp_path / "run", train), state, 150, drafter.training_update(texts, CORPUS, model, CONFIG, train), 1
    )

    def accepted(params) -> float:
        drafting = dataclasses.replace(model, drafter=DFlashDrafter(CONFIG), draft_params=params)
        prompts = [texts.tokens[row, : texts.starts[row]].astype(int).tolist() for row in range(6)]
        results = [generate(drafting, prompt, max_tokens=30).acceptance for prompt in prompts]
        return sum(result.tokens for result in results) / sum(result.rounds for result in results)

    before, after = accepted(untrained), accepted(state.params)
    assert before < 1.5
    assert after > before + 1


def test_human_share_of_a_batch_is_from_the_corpus():
    """With a share of one half, half of the rows are windows of the corpus, and all of their tokens are learnt from."""
    train = dataclasses.replace(TRAIN, human_share=0.5)
    batch = drafter.batch_of(TEXTS, CORPUS, 3, train)
    windows = np.lib.stride_tricks.sliding_window_view(CORPUS, 40)
    assert [bool((windows == row).all(axis=1).any()) for row in batch.tokens] == [False, False, True, True]
    assert all((TEXTS.tokens == row).all(axis=1).any() for row in batch.tokens[:2])
    assert batch.starts[2:].tolist() == [1, 1] and batch.ends[2:].tolist() == [40, 40]


def test_bare_blocks_train_what_others_read():
    """All blocks bare: bias and guesses learn nothing, and the rest is the published drafter's own loss. Half of them:
    both learn.
    """
    config = dataclasses.replace(CONFIG, bias_rank=4, lookup=16)
    params = drafter.init_drafter(config, jax.random.key(1))

    def gradients(config, share):
        train = dataclasses.replace(TRAIN, bare_share=share)
        of = partial(loss_fn, batch=TEXTS, target=TARGET, config=config, train=train)
        return jax.jit(jax.grad(of, has_aux=True))(params, jax.random.key(0), MODEL.params)[0]

    bare, published, half = gradients(config, 1.0), gradients(config.published, 0.0), gradients(config, 0.5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-7), bare, published)
    for extra in ("bias_out", "matched"):
        assert not np.any(bare[extra]) and np.any(half[extra])  # random texts repeat nothing, so no guess is made
    with pytest.raises(UserError, match=r"bare_share=1\.5 must be a number in 0\.\.1"):
        DraftTrainConfig(steps=1, bare_share=1.5)


def prepared(directory, train):
    run.prepare(directory, run.settings_of(CONFIG, train))
    return directory


def test_a_killed_run_goes_on_with_the_same_curve(tmp_path):
    """Stopped after a save and given again, the drafter's run ends with the parameters of an uninterrupted one."""
    ends = []
    for name, stops in (("straight", [8]), ("broken", [4, 8])):
        directory = prepared(tmp_path / name, TRAIN)
        for last in stops:
            fresh = not (directory / "checkpoints").exists()
            state = drafter.init_state(CONFIG, TRAIN) if fresh else drafter.latest_state(directory, CONFIG, TRAIN)
            update = drafter.training_update(TEXTS, CORPUS, MODEL, CONFIG, TRAIN)
            state = run.train_until(directory, state, last, update, 1, save_every=4)
        ends.append(state.params)
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert drafter.read_settings(tmp_path / "straight") == (CONFIG, TRAIN)


@pytest.mark.parametrize("kind", ["decay", "tv", "soft", "soft-dpace"])
def test_losses_are_measured_against_text_or_target(kind):
    """ "tv" is 0.1 cross-entropy + 0.9 L1 distance to the target's own distribution, "soft" the cross-entropy with that
    distribution.
    """
    texts, train = TEXTS, dataclasses.replace(TRAIN, loss=kind, anchors=1, batch=1)
    one = jax.tree.map(lambda array: array[:1], texts)
    one = dataclasses.replace(one, starts=np.array([20], np.int32), ends=np.array([40], np.int32))
    params = drafter.init_state(CONFIG, train).params
    key = jax.random.key(3)
    loss, _ = loss_fn(params, key, MODEL.params, one, TARGET, CONFIG, train)
    anchors, _ = draw_anchors(key, one.starts, one.ends, 40, 1)
    anchor = int(anchors[0, 0])
    backbone = Backbone(TARGET, CONFIG.target_layer_ids)
    logits, features, _ = backbone.apply({"params": MODEL.params}, jnp.asarray(one.tokens, jnp.int32))
    embed, head = (MODEL.params[name] for name in ("embed", "head"))
    hidden = drafter.draft_hidden(
        params, CONFIG, "block", embed, features.aux, jnp.asarray(one.tokens, jnp.int32), anchors
    )
    objective, weights = [], []
    for position in range(1, 8):
        if anchor + position >= 40:
            break
        q = scipy.special.softmax(np.asarray(hidden[0, position - 1] @ head.T, np.float64))
        p = scipy.special.softmax(np.asarray(logits[0, anchor + position - 1], np.float64))
        hard = -np.log(q[one.tokens[0, anchor + position]])
        tv = 0.1 * hard + 0.9 * np.abs(p - q).sum()
        soft = -np.sum(p * np.log(q))
        objective.append({"decay": hard, "tv": tv, "soft": soft, "soft-dpace": soft}[kind])
        weights.append(hard if kind == "soft-dpace" else np.exp(-(position - 1) / 4))
    if kind == "soft-dpace":  # D-PACE weights come from how well the text is foretold
        weights = position_weights("dpace", jnp.array([weights]), jnp.ones((1, len(weights)), bool), 4.0)[0]
    assert float(loss) == pytest.approx(np.average(objective, weights=weights), rel=1e-4)


def test_a_start_may_be_given_a_bias_and_guesses():
    """A finished drafter goes on as it is, with a bias and guesses that say nothing yet; its rank is not changed."""
    params = drafter.init_state(CONFIG, TRAIN).params
    config, more = extended(
        dataclasses.replace(CONFIG, acceptance_length=3.0), params, Geometry(bias_rank=4, lookup=16), seed=1
    )
    assert (config.bias_rank, config.lookup, config.acceptance_length) == (4, 16, None)
    assert all(more[name] is params[name] for name in params)
    assert more["bias_in"].shape == (CONFIG.vocab_size, 4) and not np.any(more["bias_out"])
    assert not np.any(more["guess"]) and not np.any(more["matched"])
    assert extended(config, more, Geometry(), seed=1)[0] == config
    with pytest.raises(UserError, match=r"bias_rank=8.* has 4"):
        extended(config, more, Geometry(bias_rank=8), seed=1)


def test_a_block_drafter_can_start_a_chain():
    """The control goes on from the same weights, without what only blocks have."""
    config, params = extended(
        CONFIG, drafter.init_state(CONFIG, TRAIN).params, Geometry(bias_rank=4, lookup=16), seed=1
    )
    bare, kept = as_chain(config, params)
    assert (bare.bias_rank, bare.lookup) == (0, 0)
    assert jax.tree.structure(kept) == jax.tree.structure(drafter.init_state(bare, TRAIN).params)
    assert all(kept[name] is params[name] for name in kept)


@pytest.mark.parametrize(
    ("field", "value"), [("loss", "hinge"), ("optimizer", "sgd"), ("steps", 0), ("anchors", -1), ("peak_rate", 0.0)]
)
def test_nonsense_settings_are_named(field, value):
    """A value no run can have is an error that names the field."""
    with pytest.raises(UserError, match=field):
        dataclasses.replace(TRAIN, **{field: value})
