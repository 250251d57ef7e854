"""Answers taken apart as they arrive: the same parts however tokens are dealt out, and nothing lost or invented."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers

from mimo_jax.loading import BUNDLED
from mimo_jax.serving.dialect import Parser, Part, Piece
from mimo_jax.serving.reply import Reply
from mimo_jax.tokenizer import END_OF_TEXT, TURN_END, Tokenizer

SCHEMAS = {"write": {"text": {"type": "string"}, "times": {"type": "integer"}}}
CALL = "<tool_call><function=write><parameter=text>a\n</parameter><parameter=times>3</parameter></function></tool_call>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED / "tokenizer.json")


@pytest.fixture(scope="module", params=["plain", "special"])
def tagged(request, tokenizer) -> Tokenizer:
    """Tags of calls are spelled by some tokenizers, and special tokens of others."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    if request.param == "special":
        backend.add_special_tokens(["<tool_call>", "</tool_call>"])
    return Tokenizer(backend)


def joined(pieces: Sequence[Piece]) -> dict[tuple[Part, int], str]:
    texts: dict[tuple[Part, int], list[str]] = {}
    for piece in pieces:
        assert piece.text
        texts.setdefault((piece.part, piece.call), []).append(piece.text)
    return {part: "".join(found) for part, found in texts.items()}


def read(reply: Reply, ids: Sequence[int], rng: random.Random | None = None, is_cut: bool = False):
    """The joined parts of tokens that arrive in random lots, or at once, as long as no stop string was found."""
    pieces, first = [], 0
    while first < len(ids) and not reply.is_stopped:
        last = min(len(ids), first + rng.randint(0, 9)) if rng else len(ids)
        pieces += reply.update(tuple(ids[first:last]))
        first = last
    return joined(pieces + reply.close(is_cut))


def test_thinking_answers_and_calls(tagged):
    """Tags that are special tokens are seen by the parser, and ends of texts by nobody."""
    ids = tagged.encode(f"I think.</think>Yes <b>.{CALL}{TURN_END}")
    expected = {
        (Part.THINKING, -1): "I think.",
        (Part.ANSWER, -1): "Yes <b>.",
        (Part.NAME, 0): "write",
        (Part.ARGUMENTS, 0): '{"text": "a\\n", "times": 3}',
    }
    end = tagged.id_of(TURN_END)
    for seed in range(20):
        reply = Reply(tagged, (end,), (), Parser(True, SCHEMAS))
        assert read(reply, ids, random.Random(seed)) == expected
        assert reply.used == len(ids) and not reply.is_stopped


PIECES = [
    "<think>",
    "</think>",
    CALL,
    CALL[:40],
    "<tool_call>",
    "naïve 👩‍💻",
    "\n\n",
    "def f(x):",
    "<",
    "</tool",
    TURN_END,
]


@pytest.mark.parametrize("seed", range(60))
def test_lots_say_what_the_whole_says(tagged, seed):
    """Tags, halves of characters and stop strings anywhere, tokens in lots of any size, the limit anywhere."""
    rng = random.Random(seed)
    ids = [rng.randrange(6, 4096) for _ in range(rng.randint(0, 9))]
    for _ in range(rng.randint(1, 12)):
        ids += tagged.encode(rng.choice(PIECES)) if rng.random() < 0.7 else [rng.randrange(6, 4096)]
    ids = ids[: rng.randint(1, len(ids))] if rng.random() < 0.3 else ids
    stop = rng.choice([(), ("def f",), ("\n", "<b"), ("ïve", "</parameter>")])
    thinking, schemas, is_cut = rng.random() < 0.5, rng.choice([SCHEMAS, None]), rng.random() < 0.5
    parsed = rng.random() < 0.8
    make = lambda: Reply(tagged, (0,), stop, Parser(thinking, schemas) if parsed else None)  # noqa: E731
    whole = make()
    expected = read(whole, ids, is_cut=is_cut)
    for _ in range(20):
        reply = make()
        assert read(reply, ids, rng, is_cut) == expected
        assert (reply.used, reply.is_stopped) == (whole.used, whole.is_stopped)


@pytest.mark.parametrize("parser", [None, Parser], ids=["plain", "parsed"])
def test_code_comes_back_byte_for_byte(tokenizer, parser):
    """This file, in which names of special tokens are text, by a parser that knows no tools; so by none."""
    source = Path(__file__).read_text(encoding="utf-8").partition("PIECES = ")[0] + "\r\n\ttab\x0b\x00 end \n\n"
    reply = Reply(tokenizer, (0, 2), (), parser() if parser else None)
    ids = tokenizer.encode(source, literal=True)
    assert read(reply, ids, random.Random(0)) == {(Part.ANSWER, -1): source}


def test_without_a_parser_special_tokens_are_no_text(tokenizer):
    """As `generate` has it."""
    ids = tokenizer.encode(f"a<think>b</think>c{END_OF_TEXT}")
    reply = Reply(tokenizer, (0,))
    assert read(reply, ids) == {(Part.ANSWER, -1): "abc"} and reply.used == len(ids)


def test_a_stop_string_ends_the_answer(tokenizer):
    """Nothing of it is shown, the tokens after it do not count, and a call that it cuts is not made."""
    ids = tokenizer.encode("one two STOP three", literal=True)
    reply = Reply(tokenizer, (2,), ["STOP", "nine"], Parser())
    assert read(reply, ids) == {(Part.ANSWER, -1): "one two "}
    assert reply.is_stopped and tokenizer.decode(ids[: reply.used]).startswith("one two ") and reply.used < len(ids)
    reply = Reply(tokenizer, (2,), ["<parameter=times>"], Parser(False, SCHEMAS))
    assert read(reply, tokenizer.encode(CALL))[Part.ARGUMENTS, 0] == '{"text": "a\\n"'


def test_what_may_become_something_else_is_held_back(tokenizer):
    """Half a character, the beginning of a stop string or of a tag; the next tokens, or the end, settle it."""
    emoji = tokenizer.encode("😀")
    assert len(emoji) > 1
    reply = Reply(tokenizer, (2,), ["STOP"], Parser(False, {}))
    said = [reply.update([token]) for token in emoji]
    assert said[:-1] == [[]] * (len(emoji) - 1) and joined(said[-1]) == {(Part.ANSWER, -1): "😀"}
    assert reply.update(tokenizer.encode("ST", literal=True)) == []
    assert joined(reply.update(tokenizer.encode("AR<tool", literal=True))) == {(Part.ANSWER, -1): "STAR"}
    assert joined(reply.close()) == {(Part.ANSWER, -1): "<tool"}
    assert reply.update([]) == []


def test_of_a_long_answer_only_the_end_is_read_again(tokenizer, monkeypatch):
    """20,000 tokens one by one: a few are decoded for each, and their text is that of all."""
    ids = tokenizer.encode("    return [item for item in items]  # naïve 日本\n" * 2000, literal=True)[:20_000]
    counts, expected, decode = [], tokenizer.decode(ids), Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, visible=(): counts.append(len(ids)) or decode(self, ids, visible)
    )
    reply = Reply(tokenizer, (2,), ["\n\nclass", "STOP"], Parser(False, SCHEMAS))
    pieces = [piece for token in ids for piece in reply.update([token])]
    assert joined(pieces + reply.close()) == {(Part.ANSWER, -1): expected}
    assert sum(counts) < 10 * len(ids)
