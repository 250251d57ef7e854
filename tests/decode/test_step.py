"""One contract for every step: the loop may use either and cannot tell."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import mimo_jax as mimo
from mimo_jax import layouts
from mimo_jax.decode.step import FlaxStep, FusedStep
from mimo_jax.drafters.fused_dflash import FusedDFlashDrafter
from mimo_jax.errors import UserError
from mimo_jax.layouts import native
from mimo_jax.modeling.backbone import Backbone
from pallas_kernels.decode_step import usable_paths
from tests.tiny import NATIVE_TOLERANCE, random_params, random_tokens, tiny_config, tiny_drafter

CONFIG = tiny_config(mtp_layers=0)
AUX = (-1, 1, 3)
LENGTH = 20  # of the text; more than two windows
TOLERANCE = NATIVE_TOLERANCE[usable_paths()[0]]


def flax_step():
    return FlaxStep(CONFIG, AUX), random_params(CONFIG)


def fused_step():
    config, params = native.pack(CONFIG, random_params(CONFIG))
    return FusedStep(config, AUX), params


STEPS = {"flax": flax_step, "fused": fused_step}


@pytest.fixture(params=STEPS)
def step(request):
    """A function (tokens, cache, counts, logits) -> (logits, features, cache), and its empty cache of two rows."""
    found, params = STEPS[request.param]()
    call = jax.jit(lambda *arguments, shown: found(params, *arguments, shown), static_argnames="shown")
    return lambda *arguments, shown="all": call(*arguments, shown=shown), found.init_cache(2, 64)


def whole(tokens: np.ndarray):
    """What the modules give for a whole sequence, without a cache."""
    return jax.jit(Backbone(CONFIG, AUX).apply)({"params": random_params(CONFIG)}, tokens)


def counts(first: int, second: int) -> np.ndarray:
    return np.array([first, second], np.int32)


def test_reading_in_pieces_is_reading_at_once(step):
    """Chunks of any size, padded or not, give the logits, hidden states and auxiliary states of the whole text."""
    read, cache = step
    tokens = random_tokens(CONFIG, 2, LENGTH)
    logits_BTC, features, _ = whole(tokens)
    start = 0
    for size in (7, 1, 8, 4):
        padded = np.pad(tokens[:, start : start + size], ((0, 0), (0, 8 - size)))
        found, shown, cache = read(padded, cache, counts(size, size))
        here = slice(start, start + size)
        np.testing.assert_allclose(found[:, :size], logits_BTC[:, here], atol=TOLERANCE)
        np.testing.assert_allclose(shown.hidden[:, :size], features.hidden[:, here], atol=TOLERANCE)
        np.testing.assert_allclose(shown.aux[:, :size], features.aux[:, here], atol=TOLERANCE)
        np.testing.assert_array_equal(shown.best[:, :size], np.argmax(found[:, :size], -1))
        start += size
    np.testing.assert_array_equal(cache.lengths, [LENGTH, LENGTH])


def test_the_last_logits_are_those_of_each_rows_last_token(step):
    """Rows of different lengths get the logits after their own last token, and experts count real tokens only."""
    read, cache = step
    tokens = random_tokens(CONFIG, 2, 8)
    found, features, cache = read(tokens, cache, counts(8, 3), shown="last")
    for row, count in enumerate((8, 3)):
        expected = whole(tokens[row : row + 1, :count])[0]
        np.testing.assert_allclose(found[row, 0], expected[0, -1], atol=TOLERANCE)
    np.testing.assert_array_equal(features.best[:, 0], np.argmax(found[:, 0], -1))
    expected = 11 * CONFIG.experts_per_token
    np.testing.assert_array_equal(features.expert_counts.sum(axis=1), [expected] * sum(CONFIG.moe_pattern))
    np.testing.assert_array_equal(cache.lengths, [8, 3])


def test_a_block_can_be_taken_back(step):
    """After a block of 8 of which 3 tokens stay, the text goes on as if the others had never been read."""
    read, cache = step
    tokens, wrong = random_tokens(CONFIG, 2, LENGTH), random_tokens(CONFIG, 2, 8, seed=9)
    _, _, cache = read(tokens[:, :12], cache, counts(12, 12))
    block = np.concatenate([tokens[:, 12:15], wrong[:, 3:]], axis=1)
    _, _, cache = read(block, cache, counts(8, 8))
    cache = dataclasses.replace(cache, lengths=cache.lengths - 5)
    found, _, _ = read(tokens[:, 15:], cache, counts(5, 5))
    np.testing.assert_allclose(found, whole(tokens)[0][:, 15:], atol=TOLERANCE)


def test_a_finished_row_keeps_its_cache(step):
    """A row that reads nothing in a round goes on later where it was."""
    read, cache = step
    tokens = random_tokens(CONFIG, 2, 16)
    _, _, cache = read(tokens[:, :8], cache, counts(8, 8))
    _, _, cache = read(tokens[:, 8:], cache, counts(8, 0))
    found, _, _ = read(tokens[:, 8:], cache, counts(0, 8))
    np.testing.assert_allclose(found[1], whole(tokens)[0][1, 8:], atol=TOLERANCE)


def test_steps_are_values():
    """Equal steps share compiled programs."""
    assert FusedStep(CONFIG, AUX) == FusedStep(CONFIG, AUX) and hash(FusedStep(CONFIG)) == hash(FusedStep(CONFIG))


def test_what_the_native_step_does_not_cover_is_refused_by_name():
    """A named layout is refused with field, value and rule; where none was named, the modules serve and say so."""
    odd = tiny_config(v_head_dim=12, mtp_layers=0)
    with pytest.raises(UserError, match=r"native step .*v_head_dim=12 must be a multiple of 8"):
        FusedStep(odd)
    with pytest.raises(UserError, match=r"layout 'native' .*v_head_dim=12"):
        layouts.for_device(odd, random_params(odd), layout="native")
    with pytest.raises(UserError, match=r"native step cannot serve this drafter: head_dim=12"):
        FusedDFlashDrafter(tiny_drafter(head_dim=12), CONFIG)


def test_a_model_that_is_not_covered_is_served_by_the_modules(capsys):
    """One line names what is slower and why."""
    odd = tiny_config(v_head_dim=12, mtp_layers=0)
    name, _, _ = layouts.for_device(odd, random_params(odd))
    assert name == "dense"
    assert "slower than natively: v_head_dim=12 must be a multiple of 8" in capsys.readouterr().err


def prompts(tokenizer, count: int, length: int) -> list[list[int]]:
    """Stretches of this project's own source."""
    root = Path(__file__).parents[2]
    text = "\n".join(path.read_text() for path in sorted((root / "mimo_jax").rglob("*.py")))
    ids = tokenizer.encode(text, True)
    return [ids[start : start + length] for start in np.linspace(0, len(ids) - length, count).astype(int)]


def test_greedy_text_is_that_of_the_modules():
    """On 200 prompts native code writes, plain and drafted, the tokens of the Flax modules in float32."""
    plain, drafting, modules = mimo.load(), mimo.load(draft="dflash"), mimo.load(draft="none", layout="dense")
    for batch in np.split(np.array(prompts(plain.tokenizer, 200, 24)), 8):
        texts = [
            [row.tokens for row in mimo.generate_batch(model, batch.tolist(), mimo.Greedy(), max_tokens=24)]
            for model in (modules, plain, drafting)
        ]
        assert texts[0] == texts[1] == texts[2]
