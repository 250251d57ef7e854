"""The loop with drafters of every quality: what comes out never depends on what was drafted."""

import collections
import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mimo_jax.decode.drafter import Draft
from mimo_jax.decode.sampling import Sampled, probabilities
from mimo_jax.decode.verify import draft_keys
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.errors import UserError
from mimo_jax.generation import Request, generate, generate_batch, stream
from mimo_jax.loading import with_confidence
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.dflash import init_drafter
from tests.tiny import tiny_drafter

LENGTHS = (1, 7, 8, 9, 15, 65)  # around the window of 8 and the first prefill bucket
PROMPTS = [np.random.default_rng(length).integers(0, 300, length).tolist() for length in LENGTHS]
COUNT = 40


class Drafting:
    """What the drafters of these tests share: nothing to remember, blocks of eight."""

    block_size = 8
    aux_layers = ()
    expected = None

    def init_cache(self, batch, capacity):
        return ()

    def update_cache(self, *_):
        return ()


@dataclasses.dataclass(frozen=True)
class Replay(Drafting):
    """Proposes what plain decoding is known to say, with an error wherever (place + position) % `period` is 0."""

    truth: tuple[tuple[int, ...], ...]
    prompt_lengths: tuple[int, ...]
    period: int

    def propose(self, context):
        place_BM = (context.lengths_B - jnp.array(self.prompt_lengths))[:, None] + jnp.arange(1, self.block_size)
        truth = jnp.pad(jnp.array(self.truth), ((0, 0), (0, 2 * self.block_size)))
        tokens_BM = jnp.take_along_axis(truth, jnp.clip(place_BM, 0, truth.shape[1] - 1), axis=1)
        return Draft(jnp.where(place_BM % self.period == 0, (tokens_BM + 1) % 300, tokens_BM), None)


@dataclasses.dataclass(frozen=True)
class Uniform(Drafting):
    """Draws every draft evenly from the same few ids."""

    ids: tuple[int, ...]

    def propose(self, context):
        shape = (context.anchor_B.shape[0], self.block_size - 1)
        draw = jax.vmap(partial(jax.random.choice, a=jnp.array(self.ids)))
        drawn = [draw(draft_keys(context.keys_B, position)) for position in range(shape[1])]
        p_C = jnp.zeros(context.weights.target["head"].shape[0]).at[jnp.array(self.ids)].set(1 / len(self.ids))
        return Draft(jnp.stack(drawn, axis=1), jnp.broadcast_to(p_C, (*shape, p_C.size)))


@pytest.fixture(scope="module")
def plain(model):
    return [generate(model, prompt, max_tokens=COUNT).tokens for prompt in PROMPTS]


@pytest.fixture(scope="module")
def drafting(model):
    """The same model with a DFlash drafter of random weights, which is hardly ever right."""
    config = tiny_drafter(vocab_size=320, bias_rank=4, lookup=16, init_range=0.2)
    return dataclasses.replace(
        model, drafter=DFlashDrafter(config), draft_params=init_drafter(config, jax.random.key(3))
    )


def replaying(model, plain, rows, period: int):
    truth = tuple(tuple(plain[row]) for row in rows)
    return dataclasses.replace(model, drafter=Replay(truth, tuple(LENGTHS[row] for row in rows), period))


def test_greedy_text_is_the_plain_text(model, drafting, plain):
    """With a drafter of random weights, greedy tokens are those of plain decoding, alone and in a batch."""
    together = generate_batch(drafting, PROMPTS, max_tokens=COUNT)
    assert [row.tokens for row in together] == plain
    alone = generate(drafting, PROMPTS[4], max_tokens=COUNT)
    assert alone.tokens == plain[4]
    assert alone.acceptance == together[4].acceptance


@pytest.mark.parametrize("period", [1, 2, 3, 5, 7, 8, 11, 1000])
def test_every_accepted_length_gives_the_plain_text(model, plain, period):
    """Drafts that are right up to any position: same text, and the counters say exactly what happened."""
    rows = (0, 3, 5)
    results = generate_batch(replaying(model, plain, rows, period), [PROMPTS[row] for row in rows], max_tokens=COUNT)
    rounds, tested, accepted = by_hand(period)
    for row, result in zip(rows, results):
        assert result.tokens == plain[row]
        assert result.acceptance.rounds == rounds
        assert result.acceptance.tested == tested and result.acceptance.accepted == accepted
        assert result.acceptance.tokens_per_round == pytest.approx((COUNT - 1) / rounds)


@dataclasses.dataclass(frozen=True)
class Hesitant(Replay):
    """Proposes (place of the anchor) % 8 of its drafts."""

    def propose(self, context):
        place_B = context.lengths_B - jnp.array(self.prompt_lengths)
        return dataclasses.replace(super().propose(context), counts=place_B % 8)


def test_a_drafter_may_propose_fewer(model, plain):
    """None at times: same text; what is not proposed is neither read nor counted."""
    rows = (0, 3, 5)
    drafter = Hesitant(tuple(tuple(plain[row]) for row in rows), tuple(LENGTHS[row] for row in rows), 1000)
    hesitant = dataclasses.replace(model, drafter=drafter)
    results = generate_batch(hesitant, [PROMPTS[row] for row in rows], max_tokens=COUNT)
    done, rounds, tested = 1, 0, np.zeros(7, int)
    while done < COUNT:
        count = (done - 1) % 8
        tested[: min(count, COUNT - done)] += 1
        done, rounds = done + count + 1, rounds + 1
    for row, result in zip(rows, results):
        assert result.tokens == plain[row] and result.acceptance.rounds == rounds
        assert result.acceptance.tested == result.acceptance.accepted == tested.tolist()


def test_confidence_ends_blocks_early(model, drafting, plain):
    """An unsure drafter proposes less, one that must be certain nothing, and the text stays as it is."""
    tested = []
    for confidence in (0.0, 0.01, 1.0):
        result = generate(with_confidence(drafting, confidence), PROMPTS[4], max_tokens=COUNT)
        assert result.tokens == plain[4]
        tested.append(sum(result.acceptance.tested))
    assert tested[0] >= tested[1] > tested[2] == 0
    with pytest.raises(UserError, match=r"confidence=1\.5 must be a number in 0\.\.1"):
        with_confidence(drafting, 1.5)
    with pytest.raises(UserError, match=r"confidence=0\.5, but only mtp and dflash"):
        with_confidence(model, 0.5)


def by_hand(period: int) -> tuple[int, list[int], list[int]]:
    """Rounds and per-position counts of a replay, from its rule alone."""
    done, rounds, tested, accepted = 1, 0, [0] * 7, [0] * 7
    while done < COUNT:
        rounds += 1
        start = done
        for position in range(8):
            if done == COUNT:
                break
            done += 1
            if position == 7:
                break
            tested[position] += 1
            if (start + position) % period == 0:
                break
            accepted[position] += 1
    return rounds, tested, accepted


def test_stops_and_limits_inside_a_block(model, plain):
    """A stop token or the token limit anywhere in an accepted block ends the text there, as plain decoding does."""
    perfect = replaying(model, plain, (2,), 1000)
    for limit in range(1, 20):
        assert generate(perfect, PROMPTS[2], max_tokens=limit).tokens == plain[2][:limit]
    for stop_id in set(plain[2]):
        stopping = dataclasses.replace(perfect, stop_ids=(stop_id,))
        result = generate(stopping, PROMPTS[2], max_tokens=COUNT)
        assert result.tokens == plain[2][: plain[2].index(stop_id) + 1]
        assert result.finish_reason == "stop"


def test_rows_finish_on_their_own(model, plain):
    """In one batch a row may end at once, another in the middle of a block, and the last go on alone."""
    rows = (0, 3, 5)
    perfect = replaying(model, plain, rows, 5)
    stop_id = plain[3][10]
    expected = [row[: row.index(stop_id) + 1] if stop_id in row else row for row in (plain[row] for row in rows)]
    stopping = dataclasses.replace(perfect, stop_ids=(stop_id,))
    results = generate_batch(stopping, [PROMPTS[row] for row in rows], max_tokens=COUNT)
    assert [result.tokens for result in results] == expected


def test_streaming_while_drafting(drafting):
    """Streamed pieces make up the text that generate returns."""
    whole = generate(drafting, PROMPTS[3], max_tokens=COUNT)
    pieces = list(stream(drafting, PROMPTS[3], max_tokens=COUNT))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].result.tokens == whole.tokens


def test_sampled_rows_do_not_depend_on_batch_mates(drafting):
    """A sampled row is the same alone and in a batch, and its seed decides it."""
    strategy = Sampled(temperature=1.2, top_p=0.9)
    requests = [Request(prompt, strategy, max_tokens=24, seed=seed) for prompt, seed in zip(PROMPTS, (5, 6, 7))]
    together = generate_batch(drafting, requests)
    assert [generate(drafting, request).tokens for request in requests] == [row.tokens for row in together]


@pytest.mark.parametrize("rule", ["token", "block"])
def test_sampled_text_has_the_targets_law(model, rule):
    """Over 3,000 seeds, the loop's first four tokens follow the target's exact joint distribution (chi-square)."""
    strategy, prompt, depth = Sampled(temperature=0.8, top_k=2), PROMPTS[1], 4
    distribution = joint_law(model, prompt, strategy, depth)
    ids = tuple(sorted({token for text in distribution for token in text}))
    drafting = dataclasses.replace(model, drafter=Uniform(ids), rule=rule)
    counts: collections.Counter = collections.Counter()
    accepted = 0
    for first in range(0, 3000, 500):
        requests = [Request(prompt, strategy, depth, seed) for seed in range(first, first + 500)]
        results = generate_batch(drafting, requests)
        counts.update(tuple(result.tokens) for result in results)
        accepted += sum(sum(result.acceptance.accepted) for result in results)
    assert set(counts) <= set(distribution)  # nothing that the filters forbid
    assert accepted > 500  # and not everything was the target's own
    expected = np.array(list(distribution.values())) / sum(distribution.values()) * counts.total()
    observed = np.array([counts[text] for text in distribution])
    common = expected >= 5
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    keep = expected > 0
    assert scipy.stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3


def joint_law(model, prompt, strategy, depth: int) -> dict[tuple[int, ...], float]:
    """Every continuation of `depth` tokens with its probability, by full forward passes."""
    forward = jax.jit(lambda tokens: Backbone(model.config).apply({"params": model.params}, tokens)[0])
    distribution: dict[tuple[int, ...], float] = {(): 1.0}
    for step in range(depth):
        texts = list(distribution)
        logits = forward(np.array([[*prompt, *text] for text in texts]))[:, len(prompt) + step - 1]
        p = np.asarray(probabilities(strategy, logits), np.float64)
        distribution = {
            (*text, int(token)): distribution[text] * row[token]
            for text, row in zip(texts, p)
            for token in itertools.chain(np.flatnonzero(row))
        }
    return distribution
