"""Text and tokens of one result agree, wherever a stop string falls and however the tokens arrive."""

import itertools
import random

import pytest

from mimo_jax.text import Transcript
from mimo_jax.tokenizer import END_OF_TEXT, Tokenizer

TEXT = "def f(items):\n    return [item for item in items]  # naïve → 0\n\n\nclass A:\n\n    pass\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 3, 330)


def arrived(tokenizer: Tokenizer, ids: list[int], stop: list[str], rng: random.Random) -> tuple[Transcript, list[str]]:
    """The transcript of tokens that arrive in random lots, and the pieces that a stream would show."""
    transcript, shown, end = Transcript(tokenizer, (), stop), "", 0
    pieces = []
    while end < len(ids) and not transcript.is_cut:
        end = min(len(ids), end + rng.randint(1, 9))
        transcript.update(ids[:end])
        settled = transcript.settled
        assert settled.startswith(shown)
        pieces.append(settled[len(shown) :])
        shown = settled
    return transcript, [*pieces, transcript.text[len(shown) :]]


@pytest.mark.parametrize("seed", range(40))
def test_pieces_join_to_the_text_and_tokens_spell_it(tokenizer, seed):
    """For stop strings from anywhere in the text, and tokens in lots of any size, past the stop too."""
    rng = random.Random(seed)
    text = "".join(rng.choice([TEXT, "\n", "  ", "é→", "return"]) for _ in range(6))
    ids = tokenizer.encode(text)
    first = rng.randrange(len(text) - 5)
    stop = [text[first : first + rng.randint(1, 5)], *(["\n\nclass"] if rng.random() < 0.5 else [])]
    _, end = min((place + len(word), place) for word in stop if (place := text.find(word)) >= 0)
    expected = text[:end]
    transcript, pieces = arrived(tokenizer, ids, stop, rng)
    assert "".join(pieces) == transcript.text == expected
    assert tokenizer.decode(transcript.tokens) == expected
    assert transcript.is_cut and transcript.used <= len(ids)
    assert tokenizer.decode(ids[: transcript.used]).startswith(expected)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_of_two_stop_strings_the_first_that_is_complete_ends_the_text(tokenizer, size):
    """However many tokens come at once; of two that are complete together it is the longer one."""
    for stop, found, text in [(["items):\n", "tem"], "tem", "def f(i"), (["m", "em", "tem"], "tem", "def f(i")]:
        transcript, ids = Transcript(tokenizer, (), stop), tokenizer.encode(TEXT)
        for end in range(size, len(ids) + size, size):
            transcript.update(ids[:end])
        assert (transcript.stop_string, transcript.text) == (found, text)


@pytest.mark.parametrize("seed", range(10))
def test_new_tokens_alone_are_decoded(tokenizer, seed):
    """What is put together lot by lot is the text of all tokens at once, characters of several tokens included."""
    rng = random.Random(seed)
    ids = [rng.randrange(6, tokenizer.vocab_size) for _ in range(200)]  # any bytes: halves of characters, too
    transcript, pieces = arrived(tokenizer, ids, [], rng)
    assert "".join(pieces) == transcript.text == tokenizer.decode(ids)
    assert transcript.tokens == ids and transcript.used == 200


def test_a_stop_string_that_begins_as_the_text_ends_is_shown_once(tokenizer):
    """A line break that is held back for a stop string, and then is text, appears once."""
    ids = tokenizer.encode("foo\n\nclass A")
    transcript, shown = Transcript(tokenizer, (), ["\nclass"]), []
    for end in range(1, len(ids) + 1):
        transcript.update(ids[:end])
        shown.append(transcript.settled)
    assert shown[-1] == "foo\n" and all(later.startswith(one) for one, later in itertools.pairwise(shown))


def test_special_tokens_in_text_are_text(tokenizer):
    """In a literal text the name of a special token is spelled; elsewhere it is the token."""
    source = f'END = "{END_OF_TEXT}"'
    literal = tokenizer.encode(source, literal=True)
    assert tokenizer.id_of(END_OF_TEXT) in tokenizer.encode(source)
    assert tokenizer.id_of(END_OF_TEXT) not in literal and tokenizer.decode(literal) == source
    assert tokenizer.encode_batch([source]) == [literal]
