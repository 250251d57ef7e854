"""Per-row controls: strategies, stops, penalties, biases and masks, against plain loops in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.decode import loop
from mimo_jax.decode.controls import Adjustments, Controls, adjusted, masked, stops_of
from mimo_jax.decode.drafter import Draft, DraftContext, NoDrafter, Weights
from mimo_jax.decode.loop import Decoder
from mimo_jax.decode.sampling import Greedy, Sampled, columns_of, probabilities, rows_of
from mimo_jax.decode.step import FlaxStep
from tests.tiny import TINY, random_params, random_tokens

STRATEGIES = (
    Greedy(),
    Sampled(0.7),
    Sampled(1.5, top_k=4),
    Sampled(0.9, top_p=0.8),
    Sampled(1.1, min_p=0.2),
    Sampled(0.5, top_k=9, top_p=0.9, min_p=0.05),
)


@pytest.mark.parametrize("places", [(), (3,)])
def test_a_row_has_the_distribution_of_its_own_strategy(places):
    """Bit for bit that of the strategy alone: a filter that others use filters nothing of it."""
    logits = jax.random.normal(jax.random.key(0), (len(STRATEGIES), *places, 50)) * 3
    found = probabilities(rows_of(STRATEGIES), logits)
    for row, strategy in enumerate(STRATEGIES):
        np.testing.assert_array_equal(found[row], probabilities(strategy, logits[row : row + 1])[0])


def test_few_programs_serve_all_strategies():
    """Three structures, whichever rows there are."""
    structures = {jax.tree.structure(columns_of([first, second])) for first in STRATEGIES for second in STRATEGIES}
    assert len(structures) == 3


def test_penalties_count_what_was_generated():
    """After every draft: those of the output and the drafts before, by the API's published formula."""
    rng = np.random.default_rng(1)
    logits, output = rng.normal(size=(2, 4, 10)).astype(np.float32), rng.integers(0, 10, (2, 6))
    counts, drafts = np.array([5, 2], np.int32), np.array([[3, 3, 1], [7, 0, 7]], np.int32)
    bias = rng.normal(size=(2, 10)).astype(np.float32)
    presence, frequency = np.array([0.5, -0.25], np.float32), np.array([0.125, 1.0], np.float32)
    found = adjusted(Adjustments(bias, presence, frequency), logits, output.astype(np.int32), counts, drafts)
    for row in range(2):
        for place in range(4):
            made = [*output[row, : counts[row]], *drafts[row, :place]]
            for token in range(10):
                count = made.count(token)
                expected = logits[row, place, token] + bias[row, token] - frequency[row] * count
                expected -= presence[row] * (count > 0)
                assert found[row, place, token] == pytest.approx(expected, abs=1e-6)


def test_masks_leave_what_their_bits_allow():
    """Token t is bit t % 32 of word t // 32; logits of the others are minus infinity."""
    rng = np.random.default_rng(2)
    words, logits = rng.integers(0, 2**32, (2, 3, 3), dtype=np.uint32), np.zeros((2, 3, 70), np.float32)
    found = np.asarray(masked(jnp.asarray(words), logits))
    for index in np.ndindex(2, 3, 70):
        *place, token = index
        is_allowed = int(words[*place, token // 32]) >> token % 32 & 1
        assert found[index] == (0.0 if is_allowed else -np.inf)


@dataclasses.dataclass(frozen=True)
class Guessing(NoDrafter):
    """Drafts what is often right, and often not: the anchor and the ids after it."""

    block_size: int = 4

    def propose(self, context: DraftContext) -> Draft:
        return Draft((context.anchor_B[:, None] * 7 + jnp.arange(3)) % TINY.vocab_size, None)


def run(decoder: Decoder, controls: Controls, prompts: np.ndarray, masks=None) -> list[list[int]]:
    """Texts of 12 tokens; with masks, every round is made of its two calls."""
    batch = len(prompts)
    weights, keys = Weights(random_params(TINY)), loop.row_keys(list(range(batch)))
    caches = loop.prefill(decoder, weights, prompts.tolist(), 64)
    limits, one = np.full(batch, 12, np.int32), None if masks is None else masks[:, :1][:, 0]
    state = loop.start(decoder, *caches, limits, keys, controls, one)
    if masks is None:
        return loop.progress(loop.decode(decoder, weights, state, controls, 50))[0]
    while not all(loop.progress(state)[1]):
        draft = loop.propose(decoder, weights, state, controls)
        whole = np.repeat(masks, draft.tokens.shape[1] + 1, axis=1)
        state = loop.commit(decoder, weights, state, controls, draft, whole, np.zeros(batch, bool))
    return loop.progress(state)[0]


PROMPTS = random_tokens(TINY, 2, 5, seed=4)
PLAIN = Decoder(FlaxStep(TINY))


@pytest.mark.parametrize("strategy", [Greedy(), Sampled(0.8)])
def test_drafting_changes_no_penalised_text(strategy):
    """Drafts are counted as if they had been said; sampled, without drafts that were drawn, keys give the same text."""
    bias = np.zeros((2, TINY.vocab_size), np.float32)
    bias[:, 9] = 4.0
    controls = Controls(
        columns_of([strategy] * 2),
        stops_of([(), ()]),
        Adjustments(bias, np.array([1.5, 0.0], np.float32), np.array([0.5, 1.0], np.float32)),
    )
    plain = run(PLAIN, controls, PROMPTS)
    assert plain != run(PLAIN, dataclasses.replace(controls, adjustments=None), PROMPTS)
    if isinstance(strategy, Greedy):
        assert run(Decoder(FlaxStep(TINY), Guessing()), controls, PROMPTS) == plain


@pytest.mark.parametrize("decoder", [PLAIN, Decoder(FlaxStep(TINY), Guessing())])
def test_a_masked_text_is_that_of_a_large_bias(decoder):
    """What a mask forbids is as impossible as what a bias of -1e9 forbids, drafted or not."""
    allowed = np.arange(TINY.vocab_size) % 5 == 2
    words = np.packbits(allowed.reshape(-1, 32), axis=-1, bitorder="little").view(np.uint32).ravel()
    masks = np.broadcast_to(words, (2, 1, len(words))).copy()
    controls = Controls(Greedy(), stops_of([(), ()]))
    bias = np.where(allowed, 0, -1e9).astype(np.float32) * np.ones((2, 1), np.float32)
    biased = dataclasses.replace(
        controls, adjustments=Adjustments(bias, np.zeros(2, np.float32), np.zeros(2, np.float32))
    )
    found = run(decoder, controls, PROMPTS, masks)
    assert found == run(PLAIN, biased, PROMPTS)
    assert all(token % 5 == 2 for row in found for token in row)


def test_held_rows_stay_as_they_are():
    """A row that takes no part in a visit goes on afterwards as if there had been none."""
    controls = Controls(Greedy(), stops_of([(), ()]))
    weights = Weights(random_params(TINY))
    caches = loop.prefill(PLAIN, weights, PROMPTS.tolist(), 64)
    state = loop.start(PLAIN, *caches, np.full(2, 12, np.int32), loop.row_keys([0, 1]), controls)
    state = loop.decode(PLAIN, weights, state, controls, 5, np.array([True, False]))
    assert list(map(len, loop.progress(state)[0])) == [1, 6]
    state = loop.decode(PLAIN, weights, state, controls, 50)
    assert loop.progress(state)[0] == run(PLAIN, controls, PROMPTS)


def test_an_eager_visit_ends_with_its_first_row():
    """So that a slot which gets free does not wait for the others."""
    controls = Controls(Greedy(), stops_of([(), ()]))
    weights = Weights(random_params(TINY))
    caches = loop.prefill(PLAIN, weights, PROMPTS.tolist(), 64)
    state = loop.start(PLAIN, *caches, np.array([4, 30], np.int32), loop.row_keys([0, 1]), controls)
    state = loop.decode(PLAIN, weights, state, controls, 100, is_eager=True)
    assert list(map(len, loop.progress(state)[0])) == [4, 4]
