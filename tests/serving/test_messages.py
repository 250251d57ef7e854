"""What clients send becomes one form, and what no template could use is refused by the name of its field."""

import json
import random

import openai
import openai.types.chat as published
import pytest

from mimo_jax.errors import UserError
from mimo_jax.serving.messages import checked_tools, normalized

CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "日本", "n": [1, null]}'}}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {"at": {}}}},
}


class Sent(openai.BaseModel):
    """Raises where a value is none of those that the official client's types allow."""

    messages: list[published.ChatCompletionMessageParam] | None = None
    tools: list[published.ChatCompletionToolParam] | None = None


def test_a_conversation_as_the_api_publishes_it():
    """Every role, in the forms that the official client's own types allow."""
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
        {"role": "user", "content": "Where?", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "here", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "There.", "refusal": None},
    ]
    Sent.model_validate({"messages": messages})
    assert normalized(messages) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Where?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "look", "arguments": {"at": "日本", "n": [1, None]}},
                }
            ],
        },
        {"role": "tool", "content": "here", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "There."},
    ]


@pytest.mark.parametrize(
    ("fields", "reasoning", "content"),
    [
        ({"content": "b", "reasoning_content": "a"}, "a", "b"),
        ({"content": "b", "reasoning": "a"}, "a", "b"),
        ({"content": "b", "reasoning": "c", "reasoning_content": "a"}, "a", "b"),
        ({"content": "<think>a</think>\n\nb"}, "a", "\n\nb"),
        ({"content": "\n<think></think>b"}, "", "b"),
        ({"content": "<think>c</think>b", "reasoning_content": "a"}, "a", "<think>c</think>b"),
        ({"content": "<think> is a tag"}, None, "<think> is a tag"),
        ({"content": "see <think>a</think>"}, None, "see <think>a</think>"),
        ({"content": "b", "reasoning_content": None}, None, "b"),
    ],
)
def test_reasoning_by_either_name_or_in_front(fields, reasoning, content):
    """Whatever a client does with thinking, the template finds it in one place, letter for letter."""
    (found,) = normalized([{"role": "assistant", **fields}])
    assert (found.get("reasoning_content"), found["content"]) == (reasoning, content)
    (user,) = normalized([{"role": "user", **fields}])
    assert user == {"role": "user", "content": fields["content"]}


def test_a_call_without_arguments():
    for arguments in ("", "{}", " {} "):
        call = {**CALL, "function": {"name": "look", "arguments": arguments}}
        (found,) = normalized([{"role": "assistant", "tool_calls": [call]}])
        assert found["tool_calls"][0]["function"]["arguments"] == {}


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
BAD_MESSAGES = [
    (None, "messages=None must be a list"),
    ([], r"messages=\[\] must be a list of at least one"),
    (["hi"], r"messages\[0\]='hi' must be an object"),
    ([{"content": "hi"}], r"messages\[0\].role=None must be one of system, developer, user, assistant, tool"),
    ([{"role": ["user"]}], r"messages\[0\].role=\['user'\]"),
    ([{"role": "function", "content": ""}], r"messages\[0\].role='function'"),
    ([{"role": "user", "content": 5}], r"messages\[0\].content=5 must be a string, a list of text parts, or null"),
    ([{"role": "user", "content": "a\ud800"}], r"messages\[0\].content: half of a surrogate pair at character 1"),
    ([{"role": "user"}, {"role": "user", "content": [IMAGE]}], r"messages\[1\].content\[0\].type='image_url'"),
    ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\].text=None must be a string"),
    ([{"role": "user", "content": ["a"]}], r"messages\[0\].content\[0\]='a' must be an object"),
    ([{"role": "tool", "content": "a"}], r"messages\[0\].tool_call_id=None must be a string"),
    ([{"role": "assistant", "reasoning": 1}], r"messages\[0\].reasoning=1 must be a string"),
    ([{"role": "assistant", "tool_calls": {}}], r"messages\[0\].tool_calls={} must be a list"),
    ([{"role": "assistant", "tool_calls": [{"type": "custom"}]}], r"messages\[0\].tool_calls\[0\].type='custom'"),
    ([{"role": "assistant", "tool_calls": [{"function": {}}]}], r"tool_calls\[0\].function.name=None"),
]


@pytest.mark.parametrize(("messages", "error"), BAD_MESSAGES)
def test_bad_messages_are_named(messages, error):
    with pytest.raises(UserError, match=error):
        normalized(messages)


@pytest.mark.parametrize(
    "arguments", ['{"a": ', "[1]", "null", {"a": 1}, None, "[" * 100_000, '{"a": "' + "b" * 10_000]
)
def test_arguments_that_are_no_object_are_named_and_not_repeated(arguments):
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}]
    with pytest.raises(UserError, match=r"messages\[0\].tool_calls\[0\].function.arguments=.*a JSON object") as error:
        normalized(messages)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_tools_as_the_api_publishes_them():
    Sent.model_validate({"tools": [TOOL]})
    assert checked_tools([TOOL]) == [TOOL]
    extra = {"type": "function", "strict": True, "function": {"name": "a.b-c_9", "strict": None, "parameters": None}}
    assert checked_tools([extra]) == [{"type": "function", "function": {"name": "a.b-c_9"}}]
    assert checked_tools(None) == checked_tools([]) == []


def function(**fields):
    return [{"type": "function", "function": {"name": "look", **fields}}]


BAD_TOOLS = [
    ({}, "tools={} must be a list"),
    ([None], r"tools\[0\]=None must be an object"),
    ([{"type": "web_search"}], r"tools\[0\].type='web_search' must be 'function'"),
    ([{"type": "function"}], r"tools\[0\].function=None must be an object"),
    (function(name="a b"), r"tools\[0\].function.name='a b' must be 1 to 64 of"),
    (function(name="a>\n"), r"tools\[0\].function.name="),
    (function(name="a\n"), r"tools\[0\].function.name="),
    (function(name="a" * 65), r"tools\[0\].function.name="),
    (function(description=["a"]), r"tools\[0\].function.description=\['a'\] must be a string"),
    (function(parameters=[]), r"tools\[0\].function.parameters=\[\] must be an object"),
    (function(parameters={"type": "array"}), r"tools\[0\].function.parameters.type='array' must be 'object'"),
    (function(parameters={"properties": [1]}), r"tools\[0\].function.parameters.properties=\[1\] must be an object"),
    ([TOOL, *function(name="see"), TOOL], r"tools\[2\].function.name='look' is declared twice"),
]


@pytest.mark.parametrize(("tools", "error"), BAD_TOOLS)
def test_bad_tools_are_named(tools, error):
    with pytest.raises(UserError, match=error):
        checked_tools(tools)


def test_any_json_is_taken_or_refused():
    """3,000 conversations with random values in random places: a form that is whole, or one line."""
    rng = random.Random(0)
    junk = [None, True, 0, -1.5, "", "x", "\ud800", "<think>", [], {}, [[]], [None], {"type": "text"}, ["a"] * 50]
    good = [
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "reasoning": "r", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "d"},
    ]
    for _ in range(3000):
        sent = json.loads(json.dumps({"messages": good, "tools": [TOOL]}))
        holder, key = sent, rng.choice(list(sent))
        while isinstance(holder[key], list | dict) and holder[key] and rng.random() < 0.8:
            holder = holder[key]
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key] = rng.choice(junk)
        try:
            found, tools = normalized(sent["messages"]), checked_tools(sent["tools"])
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            continue
        assert all(isinstance(message["content"], str) for message in found)
        json.dumps([found, tools])
