"""Fields of a body: which are known, what each may be, and the request that they make. One table for every route.

What is not known is ignored, and null is absent: clients send more fields every month.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mimo_jax.decode.sampling import Greedy, Sampled, Strategy
from mimo_jax.errors import UserError
from mimo_jax.serving.http.errors import bad_request
from mimo_jax.serving.requests import MOST_SAMPLES, MOST_SEED, MOST_TOP_LOGPROBS, TokenRequest, TooLong

if TYPE_CHECKING:
    from mimo_jax.serving.http.service import Service

MOST_STOPS, LONGEST_STOP = 16, 1000  # strings, or token ids; characters of a string
MOST_BIASES = 1024
MOST_CHOICES = 256  # of all prompts together
LARGEST = 10**9  # of a count
LONGEST_ECHO = 40  # characters of a value in a message

T = TypeVar("T", bound=Collection[int])
Fields = Mapping[str, Any]  # of a body: known, given, and right


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field's value must be, as a test and in words."""

    holds: Callable[[Any], bool]
    rule: str


def is_whole(value: Any, lowest: int = 0, highest: int = LARGEST) -> bool:
    return type(value) is int and lowest <= value <= highest


def whole(lowest: int, highest: int = LARGEST) -> Field:
    return Field(lambda value: is_whole(value, lowest, highest), f"a whole number in {lowest}..{highest}")


def real(lowest: float, highest: float) -> Field:
    return Field(lambda value: _is_real(value, lowest, highest), f"a number in {lowest:g}..{highest:g}")


def one_of(*values: str) -> Field:
    return Field(lambda value: isinstance(value, str) and value in values, f"one of {', '.join(values)}")


def _is_real(value: Any, lowest: float, highest: float) -> bool:
    return type(value) in (int, float) and lowest <= value <= highest


def is_stop(value: Any) -> bool:
    words = [value] if isinstance(value, str) else value
    return (
        isinstance(words, list)
        and len(words) <= MOST_STOPS
        and all(isinstance(word, str) and 0 < len(word) <= LONGEST_STOP for word in words)
    )


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MOST_BIASES
        and all(token.isdecimal() and len(token) < 10 and _is_real(bias, -100, 100) for token, bias in value.items())
    )


def is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(is_whole(token) for token in value)


def _are_stop_ids(value: Any) -> bool:
    return is_tokens(value) and len(value) <= MOST_STOPS  # each length of their arrays is compiled by itself


TEXT = Field(lambda value: isinstance(value, str), "a string")
FLAG = Field(lambda value: isinstance(value, bool), "true or false")
OBJECT = Field(lambda value: isinstance(value, dict), "an object")
LIST = Field(lambda value: isinstance(value, list), "a list")
OBJECTS = Field(
    lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value), "a list of objects"
)
CONTENT = Field(lambda value: isinstance(value, str | list), "a string or a list of parts")
NOT_SERVED = Field(lambda value: False, "absent: this server does not have it")
TOKENS = Field(is_tokens, "a list of token ids")
LOGPROBS = whole(0, MOST_TOP_LOGPROBS)

SAMPLING = {
    "model": TEXT,
    "max_tokens": whole(1),
    "max_completion_tokens": whole(1),
    "temperature": real(0, 2),
    "top_p": real(0, 1),
    "top_k": whole(-1),
    "min_p": real(0, 1),
    "n": whole(1, MOST_SAMPLES),
    "seed": whole(-(2**63), 2**64 - 1),
    "stop": Field(is_stop, f"a string, or up to {MOST_STOPS} of them, each of 1 to {LONGEST_STOP} characters"),
    "stop_token_ids": Field(_are_stop_ids, f"a list of up to {MOST_STOPS} token ids"),
    "ignore_eos": FLAG,
    "logit_bias": Field(_is_bias, f"an object of up to {MOST_BIASES} token ids with numbers in -100..100"),
    "presence_penalty": real(-2, 2),
    "frequency_penalty": real(-2, 2),
    "stream": FLAG,
    "stream_options": OBJECT,
    "timeout": Field(lambda value: _is_real(value, 0.001, LARGEST), "a number of seconds"),
    "user": TEXT,
    "metadata": OBJECT,
}


def read_fields(
    body: Mapping[str, Any], table: Mapping[str, Field], prefix: str = "", needed: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of a table that a body gives; the first that is wrong, or missing, is refused by its name."""
    given = {name: body[name] for name in table if body.get(name) is not None}
    for name, value in given.items():
        if not table[name].holds(value):
            raise bad_request(f"{prefix}{name}={echoed(value)} must be {table[name].rule}", prefix + name)
    for name in needed:
        if name not in given:
            raise bad_request(f"{prefix}{name} is missing: it must be {table[name].rule}", prefix + name)
    return given


@contextlib.contextmanager
def naming(table: Collection[str], **names: str) -> Iterator[None]:
    """Errors whose message begins with a field of a table, or with what is inside of one, name it as the parameter.

    `names` says what an API calls fields for which chat has other names.
    """
    try:
        yield
    except UserError as error:
        field = re.split(r"\W", str(error), maxsplit=1)[0]
        message = names.get(field, field) + str(error)[len(field) :]
        path = re.split(r"[^\w.\[\]]", message, maxsplit=1)[0]
        if type(error) is UserError and re.split(r"\W", path, maxsplit=1)[0] in table:
            raise bad_request(message, path) from None
        raise


def echoed(value: Any) -> str:
    """A value as a message shows it: what is long, or holds others, by its kind."""
    if isinstance(value, str):
        return repr(value) if len(value) <= LONGEST_ECHO else f"{value[:LONGEST_ECHO]!r}..."
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a number too large"
    kinds = {dict: "an object", list: "a list"}
    return kinds.get(type(value), repr(value))


def strategy_of(fields: Fields, default: Strategy) -> Strategy:
    """The default with what a body says in its place; a temperature of 0, and a top_p of 0, are greedy."""
    names = ("temperature", "top_p", "top_k", "min_p")
    given: dict[str, Any] = {name: fields[name] for name in names if name in fields}
    if 0 in (given.get("temperature"), given.get("top_p")):
        return Greedy()
    if isinstance(default, Greedy) and "temperature" not in given:
        return default
    if given.get("top_k") in (0, -1):
        given["top_k"] = None
    return dataclasses.replace(default, **given) if isinstance(default, Sampled) else Sampled(**given)


def stop_strings(fields: Fields) -> tuple[str, ...]:
    stop = fields.get("stop", ())
    return (stop,) if isinstance(stop, str) else tuple(stop)


def token_request(service: Service, fields: Fields, prompt: Sequence[int], account: str) -> TokenRequest:
    """What a body's sampling fields ask for. Where they name no limit, or one beyond the context, the context is it."""
    if len(prompt) >= service.context:
        raise TooLong(f"the prompt has {len(prompt)} tokens; it and the reply may have {service.context} together")
    ends = check_tokens(fields.get("stop_token_ids", ()), service.vocab_size, "stop_token_ids")
    bias = {int(token): float(value) for token, value in fields.get("logit_bias", {}).items()}
    room = service.context - len(prompt)
    asked = fields.get("max_completion_tokens", fields.get("max_tokens", room))
    return TokenRequest(
        prompt=tuple(prompt),
        max_tokens=min(asked, room),
        strategy=strategy_of(fields, service.strategy),
        seed=fields["seed"] % (MOST_SEED + 1) if "seed" in fields else secrets.randbits(32),
        samples=fields.get("n", 1),
        stop_ids=(*ends,) if fields.get("ignore_eos") else (*service.stop_ids, *ends),
        presence_penalty=fields.get("presence_penalty", 0.0),
        frequency_penalty=fields.get("frequency_penalty", 0.0),
        logit_bias=check_tokens(bias, service.vocab_size, "logit_bias"),
        seconds=fields.get("timeout", math.inf),
        account=account,
    )


def check_tokens(tokens: T, vocab_size: int, name: str) -> T:
    """Every id is one of the vocabulary; the first that is not is refused."""
    for token in tokens:
        if token >= vocab_size:
            raise bad_request(f"{name}: token id {token} is outside the vocabulary of {vocab_size}", name)
    return tokens
