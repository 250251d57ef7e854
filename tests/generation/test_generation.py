"""Generation: the same text however it is asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.decode.sampling import Greedy, Sampled
from mimo_jax.errors import UserError
from mimo_jax.generation import Request, Result, generate, generate_batch, stream
from mimo_jax.modeling.backbone import Backbone

PROMPTS = ["def f(", "for item in items: return", "x"]
SAMPLED = Sampled(temperature=0.9, top_p=0.95)


def greedy_continuation(forward, ids: list[int], count: int) -> list[int]:
    ids, padded = list(ids), np.zeros((1, 512), np.int32)
    for _ in range(count):
        padded[0, : len(ids)] = ids
        logits = forward(padded)
        ids.append(int(jnp.argmax(logits[0, len(ids) - 1])))
    return ids[-count:]


def test_cached_generation_is_the_models_own_continuation(model):
    """Whatever the prompt's length against window and prefill chunks, greedy tokens are the full forward's."""
    forward = jax.jit(lambda tokens: Backbone(model.config).apply({"params": model.params}, tokens)[0])
    for length in (1, 7, 8, 9, 19, 65, 300):
        prompt = np.random.default_rng(length).integers(0, 300, length).tolist()
        assert generate(model, prompt, max_tokens=6).tokens == greedy_continuation(forward, prompt, 6)


@pytest.mark.parametrize("strategy", [Greedy(), SAMPLED])
def test_a_row_does_not_depend_on_its_batch_mates(model, strategy):
    """A prompt's text in a batch is its text alone."""
    together = generate_batch(model, PROMPTS, strategy, max_tokens=24, seed=5)
    alone = [generate(model, prompt, strategy, max_tokens=24, seed=5) for prompt in PROMPTS]
    assert [row.tokens for row in together] == [row.tokens for row in alone]


def test_the_seed_decides_the_text(model):
    """Same seed, same text; another seed, another text; one seed per row is honoured."""
    first, again = (generate(model, "def f(", SAMPLED, max_tokens=24, seed=1).tokens for _ in range(2))
    rows = generate_batch(model, [Request("def f(", SAMPLED, max_tokens=24, seed=seed) for seed in (1, 2)])
    assert first == again == rows[0].tokens
    assert rows[1].tokens != first


@pytest.mark.parametrize("strategy", [Greedy(), SAMPLED])
def test_streamed_pieces_make_up_the_text(model, strategy):
    """What is streamed is what generate returns, token for token."""
    whole = generate(model, "def f(", strategy, max_tokens=30, seed=3)
    pieces = list(stream(model, "def f(", strategy, max_tokens=30, seed=3))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].result.tokens == whole.tokens
    assert len(pieces) > 3


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(model):
    """Stop strings cut the text before them, streaming or not, and no part of one is ever shown."""
    text = generate(model, "def f(", max_tokens=40).text
    word = text[10:14]
    cut = generate(model, "def f(", max_tokens=40, stop=[word])
    pieces = [piece.text for piece in stream(model, "def f(", max_tokens=40, stop=[word])]
    assert cut.text == text[: text.index(word)] == "".join(pieces)
    assert cut.finish_reason == "stop"


def test_a_stop_token_ends_only_its_own_row(model):
    """One row's stop token leaves the others running."""
    free = generate_batch(model, PROMPTS, max_tokens=20)
    token = free[0].tokens[3]
    stopped = generate_batch(dataclasses.replace(model, stop_ids=(token,)), PROMPTS, max_tokens=20)
    for before, after in zip(free, stopped):
        end = before.tokens.index(token) + 1 if token in before.tokens else 20
        assert after.tokens == before.tokens[:end]
        assert after.finish_reason == ("stop" if token in before.tokens else "length")
    assert len(stopped[0].tokens) <= 4


def test_the_context_bounds_the_generation(model):
    """Generation ends where the context does."""
    assert len(generate(model, [1] * 695, max_tokens=50).tokens) == 5


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt: empty"),
        ([1] * 700, {}, "prompt: 700 tokens; the context holds 700"),
        ([5, 320], {}, "token id 320 is outside the vocabulary of 320"),
        ([-1], {}, "token id -1"),
        ("a\udcff", {}, "not valid UTF-8 at character 1"),
        ([], {}, "prompt: empty"),
        ("a", {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ("a", {"seed": -1}, "seed"),
        ("a", {"seed": [1, 2]}, r"seed=\[1, 2\] must be a whole number"),
        ("a", {"max_tokens": 2.5}, "max_tokens=2.5 must be a whole number"),
        ("a", {"stop": "end"}, "stop='end' must be a list of strings"),
        ("a", {"stop": [""]}, "empty stop string"),
    ],
)
def test_bad_requests_are_named(unchecked, model, prompt, options, message):
    """A request that cannot be served says what is wrong with it."""
    with pytest.raises(UserError, match=message):
        generate(model, prompt, **options)


def test_an_empty_batch_is_named(model):
    """A batch without rows says so."""
    with pytest.raises(UserError, match="the batch is empty"):
        generate_batch(model, [])


def test_rows_of_a_batch_draw_by_their_own_strategies(model):
    """Each as it would alone, whatever its neighbours do."""
    strategies = (Greedy(), SAMPLED, Sampled(1.3, min_p=0.02), Sampled(0.7, top_k=5), Sampled(0.8, top_p=0.7))
    requests = [Request("def f(", strategy, 20, seed) for seed, strategy in enumerate(strategies)]
    together = generate_batch(model, requests)
    assert [row.tokens for row in together] == [generate(model, request).tokens for request in requests]
    assert len({tuple(row.tokens) for row in together}) == len(requests)


def test_requests_of_a_batch_keep_their_own_limits_and_stops(model):
    """Each row has its own prompt, length, seed and stop strings; its text is what it would be alone."""
    text = generate(model, "x", max_tokens=40).text
    requests = [Request("def f(", max_tokens=7), Request("x", max_tokens=40, stop=[text[9:12]])]
    together = generate_batch(model, requests)
    assert [row.text for row in together] == [generate(model, request).text for request in requests]
    assert len(together[0].tokens) == 7 and together[1].finish_reason == "stop"


def test_a_request_without_a_strategy_follows_the_model(model):
    """The checkpoint's own sampling is the default; a strategy in the call sets it aside."""
    sampling = dataclasses.replace(model, strategy=SAMPLED)
    request = Request("def f(", max_tokens=12, seed=4)
    assert generate(sampling, request).tokens == generate(model, request, SAMPLED).tokens
    assert generate(sampling, request, Greedy()).tokens == generate(model, request).tokens


def test_timing_counts_what_happened(model):
    """Counts and durations of a result are those of the call."""
    result = generate(model, "def f(", max_tokens=10)
    assert isinstance(result, Result)
    assert result.timing.generated_tokens == len(result.tokens) == 10
    assert result.timing.prompt_tokens == len(model.tokenizer.encode("def f("))
    assert 0 < result.timing.prefill_seconds <= result.timing.first_token_seconds


def test_jax_may_be_set_as_users_like(model):
    """64 bits, strict dtype promotion and no rank promotion change no token, drawn or most likely."""
    requests = [Request("def f(", strategy, max_tokens=12, seed=2) for strategy in (Greedy(), SAMPLED)]
    expected = [generate(model, request).tokens for request in requests]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert [generate(model, request).tokens for request in requests] == expected


def test_numbers_of_any_kind_are_taken(model):
    """NumPy's numbers count as Python's, and numbers beyond 32 bits mean what they say."""
    expected = generate(model, "def f(", SAMPLED, max_tokens=6, seed=3).tokens
    alike = Sampled(np.float32(0.9), top_p=np.float64(0.95), top_k=2**40)
    assert generate(model, "def f(", alike, max_tokens=np.int64(6), seed=np.uint8(3)).tokens == expected
    assert len(generate(model, np.arange(689) % 300, max_tokens=2**40).tokens) == 11


def test_nothing_after_a_stop_string_counts(model):
    """Tokens, rounds and acceptance are those of the text, however far the device went in the same visit."""
    whole = generate(model, "def f(", max_tokens=60)
    word = whole.text[20:24]
    together = generate_batch(model, [Request("def f(", stop=[word]), Request("x", max_tokens=100)])
    cut = together[0]
    assert cut.text == whole.text[: whole.text.index(word)] == model.tokenizer.decode(cut.tokens)
    assert cut.acceptance.tokens < 60 and cut.acceptance.rounds == cut.acceptance.tokens
    assert cut.timing.generated_tokens == cut.acceptance.tokens + 1 + len(together[1].tokens)
