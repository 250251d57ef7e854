"""Many paths: each is `generate`'s text for its seed, and the best one is what the rank says."""

from collections import Counter
from collections.abc import Callable

import jax
import numpy as np
import pytest

import mimo_jax as mimo
from mimo_jax.errors import UserError
from mimo_jax.loading import Model, load_dense
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.paths import best_of, tree_search

PROMPT = "def read_lines(path):\n"
WARM = mimo.Sampled(0.9)
LIMITS = mimo.Limits(slots=4, context=1024)


@pytest.fixture(scope="module")
def model():
    return mimo.load(draft="none")


@pytest.fixture(scope="module")
def engine(model):
    with mimo.Engine(model, LIMITS) as engine:
        yield engine


@pytest.fixture(scope="module")
def logprob(model) -> Callable[[str, list[int]], float]:
    """The mean log-probability of a continuation, from the modules' logits over the whole text at once."""
    dense = load_dense(mimo.BUNDLED)
    apply = jax.jit(lambda params, tokens: Backbone(dense.config).apply({"params": params}, tokens)[0])

    def mean(prompt: str, tokens: list[int]) -> float:
        ids = model.tokenizer.encode(prompt)
        whole = np.zeros((1, 128), np.int32)  # what follows a token does not change its logits
        whole[0, : len(ids) + len(tokens)] = [*ids, *tokens]
        logarithms = np.asarray(jax.nn.log_softmax(apply(dense.params, whole)[0]))
        return float(np.mean([logarithms[len(ids) + place - 1, token] for place, token in enumerate(tokens)]))

    return mean


def test_samples_are_those_of_generate(engine, model):
    """Sample i is what `generate` makes with seed + i, at the end of the range of seeds, too, cut at stop strings."""
    request = mimo.Request(PROMPT, WARM, 40, 2**32 - 3, ["return", "(self"])
    best = best_of(engine, request, 6)
    assert sorted(each.number for each in best.candidates) == list(range(6))
    for each in best.candidates:
        expected = mimo.generate(model, request, seed=(request.seed + each.number) % 2**32)
        assert (each.text, list(each.tokens)) == (expected.text, expected.tokens)
        assert each.finish_reason == expected.finish_reason
    assert {each.finish_reason for each in best.candidates} == {"stop", "length"}
    assert best.read_tokens == len(model.tokenizer.encode(PROMPT))  # once for all


def test_the_rank_is_the_mean_logprob(engine, logprob):
    """It is that of the model's own distribution, whatever the strategy, with the token that ends the text."""
    best = best_of(engine, PROMPT, 6, strategy=mimo.Sampled(0.7, top_p=0.9), max_tokens=30, seed=5)
    expected = [logprob(PROMPT, list(each.tokens)) for each in best.candidates]
    np.testing.assert_allclose([each.mean_logprob for each in best.candidates], expected, atol=1e-3)
    assert expected == sorted(expected, reverse=True) and best.winner is best.candidates[0]
    assert [each.score for each in best.candidates] == [each.mean_logprob for each in best.candidates]


def test_a_stop_string_counts_up_to_the_token_that_completes_it(engine, model, logprob):
    """A mean does not depend on how many tokens came after it before the row was stopped."""
    best = best_of(engine, PROMPT, 4, strategy=WARM, max_tokens=60, stop=["\n"])
    for each in best.candidates:
        tokens = mimo.generate(model, PROMPT, WARM, max_tokens=60, seed=each.number).tokens
        count = next(count for count in range(1, 61) if "\n" in model.tokenizer.decode(tokens[:count]))
        assert each.mean_logprob == pytest.approx(logprob(PROMPT, tokens[:count]), abs=1e-3)


def test_a_score_ranks_and_ties_go_to_the_likelier(engine):
    """Equal scores are told apart by the mean log-probability, and equal texts by their number."""
    best = best_of(engine, PROMPT, 8, lambda text: "self" in text, WARM, max_tokens=24)
    ranks = [("self" in each.text, each.mean_logprob) for each in best.candidates]
    assert ranks == sorted(ranks, reverse=True)
    same = best_of(engine, PROMPT, 3, lambda text: 1, mimo.Greedy(), max_tokens=8)
    assert [each.number for each in same.candidates] == [0, 1, 2]


def test_the_majority_wins(engine):
    """An answer's score is how many samples gave it; what has no answer has no vote."""

    def first_word(text: str) -> str | None:
        word = text.split()[0].rstrip("(:")
        return None if word == "return" else word

    best = best_of(engine, PROMPT, 16, strategy=WARM, max_tokens=8, extract=first_word)
    answers = [first_word(each.text) for each in best.candidates]
    votes = Counter(answer for answer in answers if answer is not None)
    assert None in answers and len(votes) > 1
    assert [each.score for each in best.candidates] == [votes[answer] for answer in answers]
    ranks = [(each.score, each.mean_logprob) for each in best.candidates]
    assert ranks == sorted(ranks, reverse=True)
    assert votes[first_word(best.winner.text)] == max(votes.values())


def searched(model: Model, score, beam: int, branch: int, step: int | str, limit: int, seed: int, stop: list[str]):
    """The same search by `generate`, a text at a time: (score, text, tokens, number) of what has ended, in any order,
    and how many texts were forked.
    """
    prompt = model.tokenizer.encode(PROMPT)
    ended, running, count, forked = [], [()], 0, 0
    while running:
        scored = []
        for parent in running:
            forked, ways = forked + 1, {}
            for _ in range(branch):
                left = limit - len(parent) if isinstance(step, str) else min(step, limit - len(parent))
                new = mimo.generate(model, [*prompt, *parent], WARM, max_tokens=left, seed=seed + count).tokens
                for place in range(1, len(new) + 1):
                    line, whole = model.tokenizer.decode(new[:place]), model.tokenizer.decode([*parent, *new[:place]])
                    if (isinstance(step, str) and step in line) or any(word in whole for word in stop):
                        new = new[:place]
                        break
                ways.setdefault((*parent, *new), count)
                count += 1
            scored += ways.items()
        found = []
        for tokens, number in scored:
            text = model.tokenizer.decode(tokens)
            cuts = [text.index(word) for word in stop if word in text]
            text = text[: min(cuts)] if cuts else text
            is_ended = bool(cuts) or tokens[-1] in model.stop_ids or len(tokens) == limit
            (ended if is_ended else found).append((score(text), text, tokens, number))
        running = [tokens for _, _, tokens, _ in sorted(found, reverse=True)[:beam]]
    return ended, forked


def peculiar(text: str) -> float:
    """No two texts have the same."""
    return np.random.default_rng(list(text.encode())).random()


@pytest.mark.parametrize(
    ("step", "beam", "branch", "stop"),
    [(6, 3, 3, []), (1, 2, 2, []), ("\n", 3, 2, []), ("self", 2, 3, []), (5, 3, 4, ["):"]), (99, 1, 5, ["\n\n"])],
)
def test_a_tree_is_that_of_texts_made_one_by_one(engine, model, step, beam, branch, stop):
    """Which texts go on, where steps end, what has ended, all of it: token for token. A fork reads one token."""
    best = tree_search(engine, PROMPT, peculiar, WARM, beam, branch, step, max_tokens=24, seed=3, stop=stop)
    expected, forked = searched(model, peculiar, beam, branch, step, 24, 3, stop)
    assert [(each.score, each.text, each.number) for each in best.candidates] == [
        (score, text, number) for score, text, _, number in sorted(expected, reverse=True)
    ]
    if not stop:
        assert {each.tokens for each in best.candidates} == {tokens for _, _, tokens, _ in expected}
    assert best.read_tokens == len(model.tokenizer.encode(PROMPT)) + forked - 1
    assert best.cached_tokens > 0 or forked == 1


def test_a_seed_decides_everything(engine, model):
    """Other requests beside it, what an engine has cached, and how many slots it has change nothing."""
    arguments = (PROMPT, peculiar, WARM, 2, 3, "\n")
    best = tree_search(engine, *arguments, max_tokens=40, seed=9)
    with mimo.Engine(model, mimo.Limits(slots=2, context=1024, cache_bytes=0)) as other:
        again = tree_search(other, *arguments, max_tokens=40, seed=9)
    assert best.candidates == again.candidates
    assert again.cached_tokens == 0 and again.read_tokens == best.read_tokens + best.cached_tokens
    assert tree_search(engine, *arguments, max_tokens=40, seed=10).candidates != best.candidates


def test_half_a_character_is_not_scored(engine, model):
    """Steps that end inside characters: their tokens go on as they are, and no score sees a part of one."""
    seen = []

    def shortness(text: str) -> float:
        seen.append(text)
        return -len(text)  # so that a token without a whole character is the best

    best = tree_search(engine, PROMPT, shortness, mimo.Sampled(1000.0), 2, 16, 1, max_tokens=6)
    spelled = [model.tokenizer.decode(each.tokens) for each in best.candidates]
    assert [each.text for each in best.candidates] == spelled
    assert not any(text.endswith("\ufffd") for text in set(seen) - set(spelled))
    halves = [model.tokenizer.decode(each.tokens[:size]) for each in best.candidates for size in range(1, 6)]
    assert any(text.endswith("\ufffd") for text in halves)


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (lambda engine: best_of(engine, PROMPT, 0), "n=0"),
        (lambda engine: best_of(engine, PROMPT, 65), "n=65"),
        (lambda engine: best_of(engine, "", 2), "prompt"),
        (lambda engine: best_of(engine, PROMPT, 2, len, extract=len), "score and extract"),
        (lambda engine: best_of(engine, PROMPT, 2, lambda text: None, max_tokens=2), "score: gave None"),
        (lambda engine: best_of(engine, PROMPT, 2, lambda text: "x" * 999, max_tokens=2), "score: gave 'xxx"),
        (lambda engine: best_of(engine, PROMPT, 2, extract=lambda text: [text], max_tokens=2), "extract"),
        (lambda engine: best_of(engine, PROMPT, 2, max_tokens=0), "max_tokens=0"),
        (lambda engine: best_of(engine, PROMPT, 2, stop="x"), "stop='x'"),
        (lambda engine: best_of(engine, [5] * 2000, 2), "prompt: 2000 tokens"),
        (lambda engine: tree_search(engine, PROMPT, len, beam=0), "beam=0"),
        (lambda engine: tree_search(engine, PROMPT, len, branch=True), "branch=True"),
        (lambda engine: tree_search(engine, PROMPT, len, step=0), "step=0"),
        (lambda engine: tree_search(engine, PROMPT, len, step=1.5), "step=1.5"),
        (lambda engine: tree_search(engine, PROMPT, len, step=""), "step: "),
        (lambda engine: tree_search(engine, PROMPT, lambda text: float("nan"), max_tokens=2), "score: gave nan"),
    ],
)
def test_bad_arguments_are_named_in_one_line(engine, unchecked, run, named):
    """And the engine serves on."""
    with pytest.raises(UserError) as raised:
        run(engine)
    message = str(raised.value)
    assert named in message and "\n" not in message and len(message) < 200
    assert engine.stats().is_alive


def test_a_closed_engine_says_so(model):
    """Texts that cannot be made are an error, not a shorter list."""
    engine = mimo.Engine(model, LIMITS)

    def closing(text: str) -> float:
        engine.close()
        return 0.0

    with pytest.raises(UserError, match="engine"):
        tree_search(engine, PROMPT, closing, max_tokens=64)
