"""MiMo's texts, whole and in pieces: what they mean is known here, for here they are made."""

import itertools
import json
import random
from collections.abc import Sequence

import pytest

from mimo_jax.serving.dialect import Parser, Part, Piece, schemas_of, thinks

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {
                "properties": {
                    "text": {"type": "string"},
                    "times": {"type": "integer"},
                    "options": {"type": "object"},
                    "maybe": {"type": ["string", "null"]},
                }
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": None}},
]
SCHEMAS = schemas_of(TOOLS)
WORDS = [
    "a",
    "if x < 3:",
    "<",
    "<tool",
    "</",
    "&amp;",
    "null",
    "ünï",
    "日本",
    '"quoted"',
    "\\n",
    "\n",
    "  ",
    "{}",
    "😀",
]


def joined(pieces: list[Piece]) -> tuple[str, str, list[list[str]]]:
    """Thinking, answer, and each call's name and arguments."""
    texts = {part: "".join(piece.text for piece in pieces if piece.part == part) for part in Part}
    calls = [[piece.text, ""] for piece in pieces if piece.part == Part.NAME]
    for piece in pieces:
        if piece.part == Part.ARGUMENTS:
            calls[piece.call][1] += piece.text
    return texts[Part.THINKING], texts[Part.ANSWER], calls


def read(text: str, cuts: Sequence[int] = (), thinking: bool = False, schemas=SCHEMAS, is_cut: bool = False):
    parser, pieces = Parser(thinking, schemas), []
    for first, last in zip([0, *cuts], [*cuts, len(text)]):
        pieces += parser.feed(text[first:last])
    return joined(pieces + parser.close(is_cut))


def text_of(rng: random.Random, most: int = 6) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def value_of(rng: random.Random, kind: str) -> tuple[str, object]:
    """As written, and what it means."""
    if kind == "integer":
        number = rng.randint(-(10**30), 10**30)
        return f" {number}\n", number
    if kind == "object":
        found = {text_of(rng): rng.choice([None, True, 1.5, text_of(rng), []])}
        return json.dumps(found, ensure_ascii=rng.random() < 0.5), found
    text = text_of(rng, 9)
    return text, text


def reply(rng: random.Random) -> tuple[str, bool, str, str, list]:
    """A text, whether the prompt left the model thinking, and what the text means."""
    space = lambda: rng.choice(["", " ", "\n", "\n  "])  # noqa: E731
    starts, thinking, answer = rng.random() < 0.5, "", ""
    text = ""
    if starts or rng.random() < 0.5:
        thinking = text_of(rng)
        text += ("" if starts else space() + "<think>") + thinking + "</think>"
    if rng.random() < 0.7:
        answer = space() + text_of(rng) + "end"
        text += answer
    calls = []
    for _ in range(rng.randint(0, 3)):
        name = rng.choice(["write", "stop", "unknown"])
        arguments, inner = {}, ""
        keys = {"text": "string", "times": "integer", "options": "object", "maybe": "string"}
        for key in rng.sample(list(keys), rng.randint(0, 4)) if name == "write" else []:
            written, arguments[key] = value_of(rng, keys[key])
            inner += f"<parameter={key}>{written}</parameter>{space()}"
        text += f"<tool_call>{space()}<function={name}>{space()}{inner}</function>{space()}</tool_call>{space()}"
        calls.append((name, arguments))
    return text, starts, thinking, answer, calls


def test_every_split_says_the_same():
    """200 texts in 50 random splits each, and letter by letter: what was put into them, whole or in pieces."""
    rng = random.Random(0)
    for _ in range(200):
        text, starts, thinking, answer, calls = reply(rng)
        whole = read(text, thinking=starts)
        assert whole[:2] == (thinking, answer), text
        assert [(name, json.loads(arguments)) for name, arguments in whole[2]] == calls, text
        for _ in range(49):
            cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 12)))
            assert read(text, cuts, starts) == whole, (text, cuts)
        assert read(text, list(range(1, len(text))), starts) == whole, text


def call(inner: str, name: str = "write") -> str:
    return f"<tool_call><function={name}>{inner}</function></tool_call>"


FAULTS = {
    "text after the last call": (call("", "stop") + " Done.", ("", " Done.", [["stop", "{}"]])),
    "a call ends thinking": ("hm <tool_call><function=stop></function></tool_call>", ("hm ", "", [["stop", "{}"]])),
    "html stays as it is": (
        call("<parameter=text>&lt;b&gt;</parameter>"),
        ("", "", [["write", '{"text": "&lt;b&gt;"}']]),
    ),
    "the word null": (call("<parameter=text>null</parameter>"), ("", "", [["write", '{"text": "null"}']])),
    "null where a string may be": (
        call("<parameter=maybe>null</parameter>"),
        ("", "", [["write", '{"maybe": "null"}']]),
    ),
    "no number": (call("<parameter=times>many</parameter>"), ("", "", [["write", '{"times": "many"}']])),
    "not a number": (call("<parameter=times>NaN</parameter>"), ("", "", [["write", '{"times": "NaN"}']])),
    "a number that is none": (call("<parameter=times>1e999</parameter>"), ("", "", [["write", '{"times": "1e999"}']])),
    "half a character": (
        call('<parameter=options>["\\ud800"]</parameter>'),
        ("", "", [["write", '{"options": "[\\"\\\\ud800\\"]"}']]),
    ),
    "newlines belong to values": (
        call("<parameter=text>\na\n</parameter>"),
        ("", "", [["write", '{"text": "\\na\\n"}']]),
    ),
    "a tag within a value": (
        call("<parameter=text></function></parameter>"),
        ("", "", [["write", '{"text": "</function>"}']]),
    ),
    "no end of the function": ("<tool_call><function=stop></tool_call>b", ("", "b", [["stop", "{}"]])),
    "no end of the call": ("<tool_call><function=stop></function>b", ("", "b", [["stop", "{}"]])),
    "no end at all": ("<tool_call><function=stop>", ("", "", [["stop", "{}"]])),
    "two calls without ends": (
        "<tool_call><function=stop><tool_call><function=a>",
        ("", "", [["stop", "{}"], ["a", "{}"]]),
    ),
    "two functions in a call": (
        "<tool_call><function=stop></function><function=a></function></tool_call>",
        ("", "", [["stop", "{}"], ["a", "{}"]]),
    ),
    "a tag alone": ("Use <tool_call> here", ("", "Use <tool_call> here", [])),
    "a tag at the end": ("a <tool_call>", ("", "a <tool_call>", [])),
    "half a name": ("<tool_call> <function=wri", ("", "<tool_call> <function=wri", [])),
    "half a tag": ("a <tool_ca", ("", "a <tool_ca", [])),
    "late thinking is text": ("a <think>b</think>", ("", "a <think>b</think>", [])),
    "nothing but space": (" \n", ("", "", [])),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_others(name):
    """Each in one piece and letter by letter."""
    text, expected = FAULTS[name]
    thinking = name == "a call ends thinking"
    for cuts in ([], list(range(1, len(text)))):
        assert read(text, cuts, thinking) == expected


def test_a_call_that_is_cut_off_is_not_made():
    """Cut in a value or between values, its arguments are no JSON, so nobody runs half a command."""
    text = call("<parameter=text>rm -rf old</parameter><parameter=times>3</parameter>")
    whole = read(text)[2][0][1]
    assert json.loads(whole) == {"text": "rm -rf old", "times": 3}
    ends = text.index("</function>") + len("</function>")
    for last in range(len("<tool_call><function=write>"), ends):
        ((_, arguments),) = read(text[:last], is_cut=True)[2]
        with pytest.raises(json.JSONDecodeError):
            json.loads(arguments)
    assert read(text[:ends], is_cut=True)[2][0][1] == whole


def test_a_reply_may_be_over_after_a_call():
    """However the text is cut: what comes after its first call is nothing."""
    first = call("<parameter=text>a</parameter>")
    text = f"So: {first} and {call('', 'stop')} more"
    for cuts in ([], range(1, len(text)), [text.index("and")]):
        parser, pieces = Parser(schemas=SCHEMAS, is_parallel=False), []
        for begin, end in itertools.pairwise([0, *cuts, len(text)]):
            assert parser.is_over == (begin >= text.index("</function>") + len("</function>"))
            pieces += parser.feed(text[begin:end])
        assert joined(pieces + parser.close()) == ("", "So: ", [["write", '{"text": "a"}']]) and parser.is_over


def test_text_arrives_as_it_is_written():
    """Of a value that is a string, letters are there when they are fed; of thinking and answers, too."""
    parser, seen = Parser(True, SCHEMAS), []
    for text in ("ab", "c</think>", "d", "e<tool_call><function=write><parameter=text>f", "g"):
        seen.append([piece.text for piece in parser.feed(text)])
    assert seen == [["ab"], ["c"], ["d"], ["e", "write", '{"text": "', "f"], ["g"]]


def test_without_tools_tags_are_text():
    text = "a " + call("")
    assert read(text, schemas=schemas_of([])) == ("", text, [])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think></think>", False),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>user\nWhat is <think>?<|im_end|><|im_start|>assistant\n", False),
        ("<think>old</think><|im_end|><|im_start|>user\n<|im_end|><|im_start|>assistant\n<think>", True),
    ],
)
def test_the_prompt_decides_about_thinking(prompt, expected):
    assert thinks(prompt) is expected
