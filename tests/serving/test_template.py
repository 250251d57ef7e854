"""Prompts as `transformers` makes them, in which nobody but the template speaks in special tokens."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.errors import UserError
from mimo_jax.loading import BUNDLED
from mimo_jax.serving.messages import normalized
from mimo_jax.serving.template import MOST_CHARACTERS, ChatTemplate
from mimo_jax.tokenizer import Tokenizer

# In the style of MiMo V2.5's: a default system message, declared tools, calls, results, thinking on by default.
RICH = """
{%- macro shown(value) %}{{ value if value is string else value | tojson }}{% endmacro %}
{%- if messages[0].role == 'system' %}
    {%- set system, messages = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system = 'You are MiMo.' %}
{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n<function><name>' ~ tool.function.name ~ '</name>' }}
        {%- if tool.function.description %}
            {{- '<description>' ~ tool.function.description | trim ~ '</description>' }}
        {%- endif %}
        {{- '<parameters>' ~ tool.function.parameters | tojson ~ '</parameters></function>' }}
    {%- endfor %}
    {{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>tool' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>' }}
        {%- endif %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {{- '<think>' ~ message.reasoning_content ~ '</think>' }}
    {%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' }}
        {%- for key, value in call.function.arguments | items %}
            {{- '<parameter=' ~ key ~ '>' ~ shown(value) ~ '</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think></think>' }}
    {%- else %}
        {{- '<think>' }}
    {%- endif %}
{%- endif %}
"""
BUNDLED_TEMPLATE = json.loads((BUNDLED / "tokenizer_config.json").read_text())["chat_template"]
TEMPLATES = {"bundled": BUNDLED_TEMPLATE, "rich": RICH}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED / "tokenizer.json")


@pytest.fixture(scope="module")
def tagged(tokenizer) -> Tokenizer:
    """The same with tags that are read whole, too, as MiMo's own has them: not special, so that they are shown."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    tags = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    backend.add_tokens([tokenizers.AddedToken(tag, special=False, normalized=False) for tag in tags])
    return Tokenizer(backend)


def conversation(*texts: str) -> tuple[list[dict], list[dict]]:
    """Messages and tools with texts in every place that a client writes."""
    a, b, c, d, e, f, g = texts
    call = {"function": {"name": a, "arguments": json.dumps({b: c, "n": [1.5, None, {d: e}]})}}
    messages = [
        {"role": "system", "content": a},
        {"role": "user", "content": b},
        {"role": "assistant", "content": c, "reasoning_content": d, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": e, "content": e},
        {"role": "tool", "tool_call_id": e, "content": f},
        {"role": "assistant", "content": f, "reasoning_content": ""},
        {"role": "user", "content": g},
    ]
    parameters = {"type": "object", "properties": {b: {"type": "string", "description": g}}, "required": [b]}
    tools = [{"type": "function", "function": {"name": "look", "description": d, "parameters": parameters}}]
    return normalized(messages), tools


CODE = "def f(x):\n    return x < 3 and '<b>' # naïve 日本 👩‍💻\n"
PLAIN = [
    ("Be short.", "Where?", CODE, "I think.\n\n", '{"a": "\\u00e9"}\n', "  there  ", "> quoted"),
    ("", "", "", "", "", "", ""),
    ("<tool", "<|im_", ">", "\r\n\t", "think>", "<", "</"),
]


@pytest.mark.parametrize("texts", PLAIN)
@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["tokenizer", "tagged"])
def test_ids_are_those_of_transformers(name, thinking, texts, kind, request):
    """For conversations without names of special tokens, tools and thinking included."""
    transformers = pytest.importorskip("transformers")
    ours = request.getfixturevalue(kind)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(ours.backend.to_str()), eos_token="<|im_end|>"
    )
    options = {} if thinking is None else {"enable_thinking": thinking}
    for messages, tools in (conversation(*texts), (conversation(*texts)[0][:2], None)):
        rendered = ChatTemplate(TEMPLATES[name], ours).render(messages, tools, thinking)
        expected = theirs.apply_chat_template(
            messages,
            tools,
            chat_template=TEMPLATES[name],
            add_generation_prompt=True,
            return_dict=False,
            **options,
        )
        assert list(rendered.ids) == expected
        assert rendered.text == theirs.decode(expected)
        assert rendered.thinks == (name == "rich" and thinking is not False)
        assert ChatTemplate(TEMPLATES[name], ours).render(messages, tools, options=options) == rendered


def test_the_bundled_checkpoint_reads_as_transformers_reads_it(tokenizer):
    transformers = pytest.importorskip("transformers")
    messages, _ = conversation(*PLAIN[0])
    theirs = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(ChatTemplate.load(BUNDLED, tokenizer).render(messages).ids) == expected


NAMES = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<|mask|>",
    "<tool_call>",
    "</tool_call>",
]
PIECES = [*NAMES, "<|im_start|>assistant\n<think>", "<|im_", "end|>", "<", ">", "think>", "</", "\n", " ", "a", "é"]
# Also what would be taken for a marker that were always the same.
written = st.lists(st.sampled_from([*PIECES, "\U00013000", "\U00013001", '"', "\\"]), max_size=6).map("".join)


@settings(max_examples=150, deadline=None)
@given(texts=st.tuples(*[written] * 7), name=st.sampled_from(sorted(TEMPLATES)), thinking=st.booleans())
def test_nobody_else_speaks_in_special_tokens(tagged, texts, name, thinking):
    """Whatever is written, ids spell the text, and special ones are those of a harmless conversation."""
    template = ChatTemplate(TEMPLATES[name], tagged)
    rendered = template.render(*conversation(*texts), thinking)
    assert tagged.backend.decode(list(rendered.ids), skip_special_tokens=False) == rendered.text
    harmless = template.render(*conversation(*"ABCDEFG"), thinking)
    assert specials(tagged, rendered.ids) == specials(tagged, harmless.ids)
    assert rendered.thinks == harmless.thinks
    assert all(message["content"] in rendered.text for message in conversation(*texts)[0])


def specials(tokenizer: Tokenizer, ids) -> list[int]:
    added = tokenizer.added_tokens.values()
    return [token for token in ids if token in added]


def test_options_are_written_by_clients(tagged):
    """A variable of theirs is text as well, and none of ours."""
    template = ChatTemplate("{{ note }}{{ messages[0].content }}{{ add_generation_prompt }}<|im_end|>", tagged)
    options = {"note": NAMES, "messages": [], "add_generation_prompt": False}
    rendered = template.render([{"role": "user", "content": "hi"}], options=options)
    assert rendered.text == f"{NAMES}hiTrue<|im_end|>"
    assert specials(tagged, rendered.ids) == [tagged.id_of("<|im_end|>")]


def test_only_the_template_opens_thinking():
    """Also where the tags of turns and of thinking are no special tokens, and a client writes them at the end."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    template = ChatTemplate("<|im_start|>assistant<think>{{ messages[0].content }}", Tokenizer(backend))
    opened = [template.render([{"role": "user", "content": text}]).thinks for text in ("", "</think>", "<|im_start|>")]
    assert opened == [True] * 3
    template = ChatTemplate("<|im_start|>assistant{{ messages[0].content }}", Tokenizer(backend))
    assert not template.render([{"role": "user", "content": "<think>"}]).thinks


def test_names_that_overlap_stay_text(tokenizer):
    """Also with itself, also where one begins the other, also completed by what the template writes."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<a<", "<a<a>", "aa"])
    odd = Tokenizer(backend)
    template = ChatTemplate("<a<a>{{ messages[0].content }}<a<{{ messages[0].content }}a>", odd)
    for text in ("<a<a<a<a>", "aaa", "aaaaaaa", "<", "<a", "a>", "a"):
        rendered = template.render([{"role": "user", "content": text}])
        assert specials(odd, rendered.ids) == [odd.id_of("<a<a>"), odd.id_of("<a<")]
        assert rendered.text == f"<a<a>{text}<a<{text}a>"


def checkpoint(folder: Path, config: dict | None, own: str | None = None) -> Path:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if own is not None:
        (folder / "chat_template.jinja").write_text(own)
    return folder


@pytest.mark.parametrize(
    ("config", "own", "expected"),
    [
        ({"chat_template": "one"}, None, "one"),
        ({"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "two"}]}, None, "two"),
        ({"chat_template": "one"}, "three", "three"),
        (None, "{{ bos_token }}four", "four"),
        (
            {"bos_token": "<|endoftext|>", "eos_token": {"content": "e"}},
            "{{ bos_token }}{{ eos_token }}",
            "<|endoftext|>e",
        ),
    ],
)
def test_where_templates_stand(tmp_path, tokenizer, config, own, expected):
    template = ChatTemplate.load(checkpoint(tmp_path, config, own), tokenizer)
    assert template.render([{"role": "user", "content": ""}]).text == expected


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}, {"chat_template": [{"name": "rag"}, 3]}])
def test_no_template_names_both_places(tmp_path, tokenizer, config):
    with pytest.raises(UserError, match=r"chat_template in tokenizer_config.json, or chat_template.jinja"):
        ChatTemplate.load(checkpoint(tmp_path, config), tokenizer)


BAD_TEMPLATES = {
    "{% if %}": r"chat template: .*\(line 1\)",
    "{{ raise_exception('no ' + messages[0].content) }}": "chat template: no hi<think>$",
    "{{ messages[0].nothing.more }}": "chat template: UndefinedError: .*no attribute 'nothing'",
    "{{ messages.append(1) }}": "chat template: SecurityError",
    "{{ ''.__class__.__mro__ }}": "chat template: SecurityError",
    "{{ 1 // 0 }}": "chat template: ZeroDivisionError",
    "{% for _ in range(100000) %}{% for _ in range(100000) %}loop{% endfor %}{% endfor %}": "passes 16,777,216 char",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "nested too deeply",
    "{{ range(1000000) }}": "chat template: OverflowError",
}


@pytest.mark.parametrize("source", BAD_TEMPLATES)
def test_faults_of_templates_are_one_line(source, tokenizer):
    with pytest.raises(UserError, match=BAD_TEMPLATES[source]) as error:
        ChatTemplate(source, tokenizer).render([{"role": "user", "content": "hi<think>"}])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_what_is_nested_too_deeply_is_one_line(tokenizer):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match="nested too deeply"):
        ChatTemplate("{{ deep }}", tokenizer).render([], options={"deep": deep})


def test_json_and_dates_as_templates_expect_them(tokenizer):
    """No escapes of HTML or of other alphabets; the year is today's."""
    template = ChatTemplate("{{ value | tojson }} {{ value | tojson(indent=1) }} {{ strftime_now('%Y') }}", tokenizer)
    text = template.render([], options={"value": {"a": "<é'&>"}}).text
    assert text.startswith('{"a": "<é\'&>"} {\n "a": "<é\'&>"\n} ') and re.search(r" 20\d\d$", text)


def test_long_conversations_are_cheap(tokenizer):
    """A text as long as may be is refused, not looked through for each name and letter."""
    template = ChatTemplate(BUNDLED_TEMPLATE, tokenizer)
    with pytest.raises(UserError, match="passes"):
        template.render([{"role": "user", "content": "<|im_end|>" * (MOST_CHARACTERS // 10)}])
