"""Texts continued as they are, as the official client sees it, with an engine whose answers are known."""

import openai
import pytest

from tests.serving.http.scripted import TOKENIZER

MODEL = "xiaomi/mimo"


def complete(client, prompt="def f(", **fields):
    return client.completions.create(**{"model": MODEL, "prompt": prompt, **fields})


def joined(chunks) -> dict[int, tuple]:
    """What a client makes of a stream: by choice its text, its four arrays and its finish."""
    texts, arrays, finishes = {}, {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            own = arrays.setdefault(choice.index, {})
            for name, values in (choice.logprobs.to_dict() if choice.logprobs else {}).items():
                own[name] = own.get(name, []) + values
            finishes[choice.index] = choice.finish_reason or finishes.get(choice.index)
    return {index: (texts[index], arrays[index], finishes[index]) for index in texts}


def plain(reply) -> dict[int, tuple]:
    return {
        choice.index: (choice.text, choice.logprobs.to_dict() if choice.logprobs else {}, choice.finish_reason)
        for choice in reply.choices
    }


def test_a_reply(client, engine):
    """The text follows the prompt verbatim: no template, and no meaning in tags."""
    engine.says(" a, <tool_call> b):")
    reply = complete(client)
    assert reply.choices[0].text == " a, <tool_call> b):" and reply.choices[0].finish_reason == "stop"
    assert (reply.object, reply.model, reply.id[:5]) == ("text_completion", MODEL, "cmpl-")
    assert list(engine.requests[0].prompt) == TOKENIZER.encode("def f(")
    assert reply.usage.prompt_tokens == len(TOKENIZER.encode("def f("))
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>x", [[1, *TOKENIZER.encode("x")]]),
        (["a", "b c"], [TOKENIZER.encode("a"), TOKENIZER.encode("b c")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_prompts_have_four_forms(client, engine, prompt, expected):
    """Choice p * n + i is choice i of prompt p, and every prompt counts once."""
    engine.says("zero", "one", "two")
    reply = complete(client, prompt, n=3)
    assert [list(request.prompt) for request in engine.requests] == expected
    assert [choice.index for choice in reply.choices] == list(range(3 * len(expected)))
    assert [choice.text for choice in reply.choices] == ["zero", "one", "two"] * len(expected)
    assert reply.usage.prompt_tokens == sum(map(len, expected))


def test_echo(client, engine):
    """The prompt comes first, once, whether it was text or ids."""
    engine.says(" a):")
    assert complete(client, echo=True).choices[0].text == "def f( a):"
    assert complete(client, TOKENIZER.encode("def f("), echo=True).choices[0].text == "def f( a):"
    assert joined(complete(client, echo=True, stream=True))[0][0] == "def f( a):"


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": 2}, {"logprobs": 0, "stop": "d t"}, {"n": 2, "max_tokens": 3}, {"echo": True}]
)
def test_a_stream_adds_up_to_the_reply(client, engine, fields, size):
    engine.says("one and two, naïve 日本", "red and tall", size=1000)
    whole = complete(client, **fields)
    engine.says("one and two, naïve 日本", "red and tall", size=size)
    assert joined(complete(client, stream=True, **fields)) == plain(whole)


def test_logprobs(client, engine):
    """Four arrays of one length; a token's text stands in the text where its offset says."""
    engine.says("one and naïve 日本")
    choice = complete(client, logprobs=3).choices[0]
    rows = choice.logprobs
    assert len(rows.tokens) == len(rows.token_logprobs) == len(rows.top_logprobs) == len(rows.text_offset)
    assert set(rows.token_logprobs) == {-0.5} and all(len(top) == 3 for top in rows.top_logprobs)
    spelled = [(token, offset) for token, offset in zip(rows.tokens, rows.text_offset) if "bytes:" not in token]
    assert spelled and all(choice.text[offset:].startswith(token) for token, offset in spelled)
    assert len(rows.tokens) == len(TOKENIZER.encode("one and naïve 日本"))


def test_usage_closes_a_stream(client, engine):
    *chunks, last = complete(client, ["a", "b"], stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks) and last.choices == []
    assert last.usage.prompt_tokens == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[1, 2], ["a"]]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 64}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"extra_body": {"echo": "yes"}}, "echo"),
    ],
)
def test_wrong_fields_are_named(client, engine, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    assert caught.value.param == param
    assert not engine.requests
