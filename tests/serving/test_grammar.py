"""Grammars against what can be enumerated, parsed or validated without them."""

import functools
import itertools
import json
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.errors import UserError
from mimo_jax.loading import BUNDLED
from mimo_jax.serving.dialect import Parser, Part, schemas_of
from mimo_jax.serving.grammar import Grammar, Grammars
from mimo_jax.serving.requests import Matcher
from mimo_jax.tokenizer import Tokenizer

LOGITS = 4109  # more than tokens, and no multiple of 32
STOPS = (2, 0)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    },
    "required": ["name", "next"],
    "additionalProperties": False,
}


@functools.cache
def tokenizer(*names: str) -> Tokenizer:
    """The bundled one; `names` are pairs of an added token and another name for it, which is not special."""
    values = json.loads((BUNDLED / "tokenizer.json").read_text())
    for old, new in zip(names[::2], names[1::2]):
        added = next(token for token in values["added_tokens"] if token["content"] == old)
        added["content"], added["special"] = new, False
        values["model"]["vocab"][new] = values["model"]["vocab"].pop(old)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(values)))


@functools.cache
def grammars(*names: str) -> Grammars:
    return Grammars(tokenizer(*names), LOGITS, STOPS)


@functools.cache
def pieces(*names: str) -> dict[int, bytes]:
    """The bytes of each token that is text, by GPT-2's alphabet: printable bytes are themselves, others follow 255."""
    backend, plain = tokenizer(*names).backend, [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet |= {chr(256 + place): byte for place, byte in enumerate(sorted({*range(256)} - {*plain}))}
    ordinary = set(backend.get_vocab().values()) - set(backend.get_added_tokens_decoder())
    return {token: bytes(alphabet[char] for char in backend.id_to_token(token)) for token in ordinary}


def bits(matcher: Matcher, drafts: Sequence[int] = ()) -> np.ndarray:
    out = np.zeros((len(drafts) + 1, -(-LOGITS // 32)), np.uint32)
    matcher.masks(drafts, out)
    return np.unpackbits(out.view(np.uint8), axis=1, bitorder="little").astype(bool)


def rows(matcher: Matcher, drafts: Sequence[int] = ()) -> list[set[int]]:
    return [set(np.flatnonzero(row).tolist()) for row in bits(matcher, drafts)]


def write(matcher: Matcher, tokens: Sequence[int]) -> None:
    for token in tokens:
        assert token in rows(matcher)[0]
        matcher.commit([token])


def sampled(matcher: Matcher, rng: random.Random, most: int = 2000) -> list[int]:
    """Tokens of a random text, without its stop. Ends are likely, or a string would be most of it."""
    tokens: list[int] = []
    while not (allowed := bits(matcher)[0])[[*STOPS]].any() or rng.random() < 0.3:
        allowed[[*STOPS]] = False
        if not allowed.any():
            break
        ends = np.flatnonzero(allowed & ENDS)
        new = [int(rng.choice(ends if len(ends) and rng.random() < 0.4 else np.flatnonzero(allowed)))]
        if rng.random() < 0.2 and bits(matcher, END)[range(len(END)), END].all():
            new = END
        tokens += new
        matcher.commit(new)
        assert len(tokens) < most
    return tokens


PIECES = pieces()
END = tokenizer().encode("</parameter>", literal=True)
ENDS = np.zeros(-(-LOGITS // 32) * 32, bool)
ENDS[[token for token, piece in PIECES.items() if re.match(rb'["\]},:0-9]|</?[pf]', piece)]] = True
ENUMERABLE = {
    "words": ({"enum": ["red", "green", "grün 日本", "re", 'say "hi"\n']}, None),
    "boolean or null": ({"type": ["boolean", "null"]}, ["true", "false", "null"]),
    "small whole number": ({"type": "integer", "minimum": -3, "maximum": 12}, ["-0", *map(str, range(-3, 13))]),
    "object": (
        {
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "b": {"const": 1}, "c": {"enum": ["x", None]}},
            "required": ["c"],
            "additionalProperties": False,
        },
        [
            "{" + ",".join(filter(None, keys)) + "}"
            for keys in itertools.product(
                ["", '"a":true', '"a":false'], ["", '"b":1'], ['"c":"x"', '"c":null']
            )
        ],
    ),
    "array": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        ["[true]", "[false]", *(f"[{a},{b}]" for a in ("true", "false") for b in ("true", "false"))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENUMERABLE)
def test_a_mask_is_the_set_of_tokens_that_some_valid_text_goes_on_with(name):
    """Nothing valid is forbidden, however it is spelled; nothing else is allowed; stops are, where a text is whole."""
    schema, texts = ENUMERABLE[name]
    texts = [text.encode() for text in texts or [json.dumps(word, ensure_ascii=False) for word in schema["enum"]]]
    for seed in range(6):
        rng, matcher, so_far = random.Random(seed), grammars().json_schema(schema).matcher(), b""
        while True:
            rest = [text[len(so_far) :] for text in texts if text.startswith(so_far)]
            expected = {token for token, piece in PIECES.items() if any(left.startswith(piece) for left in rest)}
            expected |= set(STOPS) if b"" in rest else set()
            assert rows(matcher)[0] == expected, so_far
            token = rng.choice(sorted(expected))
            if token in STOPS:
                break
            matcher.commit([token])
            so_far += PIECES[token]


@pytest.mark.parametrize("thinking", [False, True])
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_block_has_the_masks_of_its_tokens_one_by_one(thinking, data):
    """Also where drafts are refused, stop, do not exist, or begin the grammar; and none leaves a trace."""
    end = tokenizer().encode("</think>")
    good = tokenizer().encode('{"name":"Ada </think>","age":36,"tags":["a"],"next":null}', literal=True)
    grammar = grammars().json_schema(PERSON)
    text = [*(tokenizer().encode("so { then\n") + end if thinking else []), *good, 2]
    one, other, at = grammar.matcher(thinking), grammar.matcher(thinking), 0
    while at < len(text):
        right = text[at : at + data.draw(st.integers(0, 8))]
        strange = st.sampled_from([*end, *STOPS, 5, 100, 4095, 4096, LOGITS, 10**6, *text])
        drafts = right + data.draw(st.lists(strange, max_size=3))
        found = rows(one, drafts)
        assert found == rows(one, drafts)
        walker = grammar.matcher(thinking)
        walker.commit(text[:at])
        for place, draft in enumerate(drafts):
            assert found[place] == rows(walker)[0] if place else found[place] == rows(other)[0]
            if draft not in found[place] or draft in STOPS:
                assert all(found[place + 1 :])
                break
            walker.commit([draft])
        else:
            assert found[-1] == rows(walker)[0]
        step = max(1, len(right))
        one.commit(text[at : at + step])
        other.commit(text[at : at + step])
        at += step
    assert rows(one)[0] == set(STOPS)


def fits(value: object, schema: Mapping, root: Mapping) -> bool:
    """Whether a value is what a schema says, for the keywords that are used here."""
    if "$ref" in schema:
        return fits(value, root, root)
    kinds = {"string": str, "integer": int, "array": list, "object": dict, "null": type(None), "boolean": bool}
    kinds["number"] = (int, float)
    named = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", kinds)
    checks = [any(isinstance(value, kinds[kind]) for kind in named)]
    checks += [any(fits(value, option, root) for option in schema["anyOf"])] if "anyOf" in schema else []
    checks += [value in schema["enum"]] if "enum" in schema else []
    if isinstance(value, int | float):
        checks.append(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    elif isinstance(value, list):
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
        checks += [fits(item, schema.get("items", {}), root) for item in value]
    elif isinstance(value, dict):
        free = schema.get("additionalProperties", {})
        checks += [key in value for key in schema.get("required", [])]
        for key, inner in value.items():
            rule = schema.get("properties", {}).get(key, free)
            checks.append(rule is not False and fits(inner, rule, root))
    return all(checks)


SAMPLED = {
    "recursive": PERSON,
    "any object": {"type": "object"},
    "free keys": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    "nested": {"type": "array", "minItems": 1, "maxItems": 4, "items": {"type": ["number", "array"], "items": PERSON}},
}
SAMPLED["nested"]["items"]["items"] = {"type": "boolean"}


@pytest.mark.parametrize("name", SAMPLED)
def test_whatever_is_drawn_under_the_masks_is_valid_json(name):
    """A text that has stopped can be parsed, and is what the schema says."""
    schema = SAMPLED[name]
    grammar = grammars().json_object() if name == "any object" else grammars().json_schema(schema, strict=True)
    for seed in range(12):
        tokens = sampled(grammar.matcher(), random.Random(seed))
        text = b"".join(PIECES[token] for token in tokens).decode()
        assert fits(json.loads(text), schema, schema), text


SIZE = {"type": "number", "minimum": -1000, "maximum": 1000}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "unit": {"type": "string", "enum": ["°C", "°F"]},
                    "times": {"type": "integer"},
                    "options": {"$ref": "#/$defs/options", "type": "object"},
                    "any": {},
                },
                "required": ["text", "options", "undeclared"],
                "$defs": {"options": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
                                      "additionalProperties": False}},
            },
        },
    },
    {"type": "function", "function": {"name": "write.all", "parameters": {"properties": {"x": SIZE}}}},
    {"type": "function", "function": {"name": "stop"}},
]  # fmt: skip
CALLED = {
    "write": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "unit": {"enum": ["°C", "°F"]},
            "times": {"type": "integer"},
            "options": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
            "any": {"type": "string"},
            "undeclared": {"type": "string"},
        },
        "required": ["text", "options", "undeclared"],
        "additionalProperties": False,
    },
    "write.all": {"type": "object", "properties": {"x": SIZE}, "additionalProperties": False},
    "stop": {"type": "object", "additionalProperties": False},
}


def calls_of(text: str, thinking: bool = False) -> list[tuple[str, object]]:
    parser = Parser(thinking, schemas_of(TOOLS))
    found = parser.feed(text) + parser.close()
    assert not [piece for piece in found if piece.part == Part.ANSWER]
    names = [piece.text for piece in found if piece.part == Part.NAME]
    arguments = [""] * len(names)
    for piece in found:
        if piece.part == Part.ARGUMENTS:
            arguments[piece.call] += piece.text
    return list(zip(names, map(json.loads, arguments)))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("added", [(), ("<|mask|>", "<tool_call>")])
def test_what_is_drawn_from_a_tool_grammar_is_calls(added, parallel):
    """The parser finds calls and nothing else: of declared functions, with the arguments they need."""
    grammar, met = grammars(*added).tool_calls(TOOLS, "required", parallel), set()
    for seed in range(60):
        tokens = sampled(grammar.matcher(), random.Random(seed))
        spelled = {**PIECES, 5: b"<tool_call>"}
        found = calls_of(b"".join(spelled[token] for token in tokens).decode())
        assert found and (parallel or len(found) == 1)
        met |= {name for name, _ in found} | {len(found)} | {5} & {*tokens}
        for name, arguments in found:
            assert fits(arguments, CALLED[name], {}), arguments
    assert {*CALLED, 1, *([2] if parallel else []), *([5] if added else [])} <= met


def test_beside_tools_an_answer_may_be_drawn_instead():
    """What comes is either calls, or a value of the schema; and both come."""
    schema, met = {"type": "object", "properties": {"n": SIZE}, "required": ["n"], "additionalProperties": False}, set()
    grammar = grammars().tool_calls_or_json(TOOLS, True, schema)
    for seed in range(30):
        text = b"".join(PIECES[token] for token in sampled(grammar.matcher(), random.Random(seed))).decode()
        met.add(text[0])
        assert calls_of(text) if text[0] == "<" else fits(json.loads(text), schema, {}), text
    assert met == {"<", "{"}


def test_a_call_can_be_written_as_the_model_does():
    """The layout is that of MiMo's template, with values verbatim and any declared argument left out."""
    text = (
        "<tool_call>\n<function=write>\n<parameter=text>\n if a < b:\n\t</param> 日本\n</parameter>\n"
        '<parameter=times>3</parameter>\n<parameter=options>{"on":true}</parameter>\n'
        "<parameter=undeclared></parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=stop>\n</function>\n</tool_call>"
    )
    matcher = grammars().tool_calls(TOOLS).matcher()
    write(matcher, tokenizer().encode(text, literal=True))
    assert set(STOPS) < rows(matcher)[0]
    assert [name for name, _ in calls_of(text)] == ["write", "stop"]


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "stop"}}, {"name": "stop"}])
def test_a_named_function_is_the_only_one(choice):
    grammar = grammars().tool_calls(TOOLS, choice, parallel=False)
    tokens = sampled(grammar.matcher(), random.Random(0))
    assert calls_of(b"".join(PIECES[token] for token in tokens).decode()) == [("stop", {})]


SPELLINGS = {  # of the end of thinking: added tokens renamed, its ids or text
    "special token": ((), [4]),
    "in pieces, though there is a token": ((), "</think>"),
    "added token": (("</think>", "</think>"), [4]),
    "ordinary tokens": (("<think>", "<|a|>", "</think>", "<|b|>"), "</think>"),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("size", [1, 3, 8, 40])
def test_the_grammar_begins_right_after_thinking(name, size):
    """Wherever in a block that ends. Until then every token is allowed, but those that stop or run past the end."""
    added, end = SPELLINGS[name]
    ours = tokenizer(*added)
    thought = [*ours.encode('Hm: {"a": </thin or "</think".\n', literal=True), 3, 5, 1]
    end = end if isinstance(end, list) else ours.encode(end, literal=True)
    answer = ours.encode('{"a":true}', literal=True)
    text = [*thought, *end, *answer]
    grammar = grammars(*added).json_schema(
        {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    )
    fresh, matcher = grammar.matcher(), grammar.matcher(thinking=True)
    masks = [rows(matcher)[0]]
    for at in range(0, len(text), size):
        block = text[at : at + size]
        masks += rows(matcher, block)[1:]
        matcher.commit(block)
    words = set(ours.backend.get_vocab().values()) - set(STOPS)
    for place in range(len(thought) + len(end)):
        before = b"".join(pieces(*added).get(token, b"") for token in text[:place])
        tag = re.search(rb"</?t?h?i?n?k?$", before)
        past = b"</think>"[len(tag[0]) :] if tag else b"</think>"
        late = {token for token, piece in pieces(*added).items() if piece.startswith(past) and piece != past}
        assert masks[place] == words - late
        assert text[place] in masks[place]
    for place, token in enumerate(answer, len(thought) + len(end)):
        assert masks[place] == rows(fresh)[0]
        fresh.commit([token])
    assert masks[-1] >= set(STOPS)


def test_a_tool_grammar_waits_for_the_end_of_thinking():
    """Who reads the reply takes a call in a thought for a call, so none can be begun there."""
    matcher = grammars().tool_calls(TOOLS).matcher(thinking=True)
    tag = tokenizer().encode("<tool_call>", literal=True)
    write(matcher, tag[:-1])
    assert tag[-1] not in rows(matcher)[0]
    write(matcher, [4, *tag])


@pytest.mark.parametrize("text", ["</think>", "</think>\n", "</think>{"])
def test_no_token_ends_thinking_in_its_middle(text):
    """The rest of such a token would be text that no grammar has seen."""
    added = ("<think>", text, "</think>", "<|b|>")
    matcher = grammars(*added).json_object().matcher(thinking=True)
    assert (3 in rows(matcher)[0]) == (text == "</think>")


def chain(depth: int, make) -> dict:
    links = {f"a{at}": make({"$ref": f"#/$defs/a{at + 1}"}) for at in range(depth)}
    return {"$defs": {**links, f"a{depth}": {"type": "object", "properties": {"x": {"type": "string"}}}},
            "$ref": "#/$defs/a0"}  # fmt: skip


def nested(depth: int) -> dict:
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def needs(key: str) -> dict:
    return {"type": "object", "properties": {key: {"type": "integer"}}, "required": [key]}


WRONG = {
    "type": ({"type": "text"}, "text"),
    "reference": ({"$ref": "#/$defs/x"}, "/$defs/x"),
    "remote reference": ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
    "nothing": ({"enum": []}, "empty"),
    "itself": ({"$ref": "#"}, "no text"),
    "pattern": ({"type": "string", "pattern": "a("}, ""),
    "not JSON": ({"const": {1, 2}}, "JSON"),
    "not a number": ({"const": float("nan")}, "JSON"),
    "half a character": ({"const": "\ud800"}, ""),
    "deep": (nested(5000), "64"),
    "large": ({"enum": ["x" * 70_000]}, "65,536"),
    "many": ({"enum": list(range(10_001))}, "10,000"),
    "all of any of": ({"allOf": [{"anyOf": [needs(f"{a}{b}") for b in "abc"]} for a in range(12)]}, ""),
    "patterns of keys": ({"type": "object", "patternProperties": {f"^a{at}b": {} for at in range(1000)}}, "2 s"),
    "copies": (
        chain(
            20,
            lambda ref: {"type": "object", "properties": {key: {**ref, "required": [key]} for key in "abcde"}},
        ),
        "2 s",
    ),
    "patterns": ({"allOf": [{"type": "string", "pattern": f"(.*{c}.*){{7}}"} for c in "abcdefgh"]}, ""),
    "limits": ({"type": "number", "minimum": -1e300, "maximum": 1e300}, ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_schema_is_refused_in_one_line(name):
    """Soon, by the parameter's name, and without repeating a long one."""
    schema, said = WRONG[name]
    begin = time.perf_counter()
    with pytest.raises(UserError, match=r"\Aresponse_format: .{3,240}\Z") as caught:
        grammars().json_schema(schema)
    assert said in str(caught.value)
    assert time.perf_counter() - begin < 10  # a bomb takes minutes


BOMBS = {
    "alternatives": chain(25, lambda ref: {"anyOf": [ref] * 8}),
    "properties": chain(25, lambda ref: {"type": "object", "properties": {"a": ref, "b": ref}}),
    "intersections": chain(25, lambda ref: {"allOf": [ref, ref]}),
    "items": {"type": "array", "maxItems": 10**9, "minItems": 10**9, "items": {"type": "integer"}},
    "items of items": {"type": "array", "maxItems": 10**9, "items": {"type": "array", "minItems": 10**6}},
    "length": {"type": "string", "minLength": 10**9},
    "lengths": {"type": "string", "minLength": 10**5, "maxLength": 10**6},
    "keys": {"type": "object", "minProperties": 10**9},
    "repetitions": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "automaton": {"type": "string", "pattern": "(a|b)*a(a|b){300}"},
    "optional keys": {"type": "object", "properties": {f"p{at}": {"type": "integer"} for at in range(1500)}},
    "depth": nested(30),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_defused_or_refused(name):
    """Numbers that multiply cost neither memory nor time: such a schema is followed, or an error says why not."""
    try:
        matcher = grammars().json_schema(BOMBS[name]).matcher()
        for _ in range(30):
            matcher.commit([min(rows(matcher)[0])])
    except UserError as error:
        assert re.fullmatch(r".{3,240}", str(error))


def test_strict_names_what_cannot_be_enforced():
    """Else it is passed over, and the rest enforced."""
    schema = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}
    with pytest.raises(UserError, match=r"\Aresponse_format: .*uniqueItems"):
        grammars().json_schema(schema, strict=True)
    write(grammars().json_schema(schema).matcher(), tokenizer().encode("[1,1]"))


def test_a_schema_cannot_change_how_json_is_written():
    """Free whitespace would let a small model write nothing else."""
    schema = {"const": [1, 2], "x-guidance": {"whitespace_flexible": True, "item_separator": ";"}}
    text = b"".join(PIECES[token] for token in sampled(grammars().json_schema(schema).matcher(), random.Random(0)))
    assert text == b"[1,2]"


WRONG_TOOLS = {
    "reference": {"properties": {"a": {"type": "object", "$ref": "#/$defs/x"}}},
    "name": {"properties": {"a>b": {"type": "string"}}},
    "required": {"required": "a"},
    "size": {"properties": {"a": {"type": "string", "enum": ["x" * 70_000]}}},
    "repeated": {
        "properties": {f"a{at}": {"type": "object", "$ref": "#/$defs/x"} for at in range(500)},
        "$defs": {"x": {"type": "object", "properties": {f"p{at}": {"type": "integer"} for at in range(500)}}},
    },
}


@pytest.mark.parametrize("name", WRONG_TOOLS)
def test_wrong_tools_are_refused_in_one_line(name):
    tools = [{"type": "function", "function": {"name": "f", "parameters": WRONG_TOOLS[name]}}]
    with pytest.raises(UserError, match=r"\Atools: .{3,240}\Z"):
        grammars().tool_calls(tools)
    with pytest.raises(UserError, match=r"\Atool_choice: .{3,240}\Z"):
        grammars().tool_calls(tools, {"name": "g"})


def test_a_pattern_or_a_choice_is_matched_as_a_whole():
    matcher = grammars().regex(r"a/[bc]{2}\n?").matcher()
    write(matcher, tokenizer().encode("a/cb"))
    assert rows(matcher)[0] == {*STOPS, *tokenizer().encode("\n")}
    matcher = grammars().choice(['"', "yes/no", ""]).matcher()
    write(matcher, tokenizer().encode("yes/no"))
    assert rows(matcher)[0] == set(STOPS)
    with pytest.raises(UserError, match=r"\Aregex: error: unclosed group\Z"):
        grammars().regex("a(")
    with pytest.raises(UserError, match=r"\Aregex: .{3,240}\Z"):
        grammars().regex("\ud800")


def test_matchers_of_one_grammar_do_not_disturb_each_other():
    """Samples of a request share a grammar, and so do requests in other threads."""
    ours = Grammars(tokenizer(), LOGITS, STOPS)
    alone = [sampled(grammars().json_schema(PERSON).matcher(), random.Random(seed)) for seed in range(4)]
    together: dict[int, list[int]] = {}

    def draw(seed: int) -> None:
        together[seed] = sampled(ours.json_schema(PERSON).matcher(), random.Random(seed))

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together.get(seed) for seed in range(4)] == alone


def test_a_grammar_is_compiled_once():
    assert grammars().json_schema(PERSON) is grammars().json_schema(dict(PERSON))


def test_what_one_text_uses_up_is_no_loss_to_the_next(monkeypatch):
    """A text that no state is left for ends with an error, and the grammar is as good as new."""
    import llguidance

    monkeypatch.setattr("mimo_jax.serving.grammar.LIMITS", llguidance.LLParserLimits(max_lexer_states=60))
    grammar: Grammar = grammars().regex("(a|b)*a(a|b){40}x")
    for _ in range(2):
        matcher, rng = grammar.matcher(), random.Random(0)
        write(matcher, tokenizer().encode("ab"))
        with pytest.raises(UserError, match=r"\Agrammar: .{3,240}\Z"):
            for _ in range(400):
                matcher.commit([rng.choice([token for token in rows(matcher)[0] if token not in STOPS])])


def test_a_model_must_have_a_stop_token():
    with pytest.raises(UserError, match="stop token"):
        Grammars(tokenizer(), LOGITS, ())
