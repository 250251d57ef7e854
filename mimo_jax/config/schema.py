"""How a published `config.json` is read and written: a table of keys and fields, and one reader for all tables.

A key with a dot lies in a table of that name. Whatever the schema does not allow is an error in the words of the file.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from mimo_jax.errors import UserError

_ABSENT = object()
_MAX_VALUE_TEXT = 1000  # characters of a value that an error quotes, at most


@dataclasses.dataclass(frozen=True)
class Schema:
    """What a `config.json` may say.

    `required` lists keys whose other values would need mathematics this package does not have; null is as good as
    absent. `equal` pairs keys that must agree where both are given; `own` are keys that published files lack, with the
    value at which they are not written.
    """

    name: str  # that errors of the config class begin with
    keys: dict[str, str]  # key -> field; needed unless optional
    optional: frozenset[str]
    required: dict[str, tuple[Any, ...]]
    equal: dict[str, str]
    own: dict[str, Any] = dataclasses.field(default_factory=dict)

    def find(self, values: dict[str, Any], where: str) -> dict[str, Any]:
        """Field -> value, of keys that are given and not null."""
        found = {key: _lookup(values, key, where) for key in (*self.keys, *self.required, *self.equal)}
        given = {key: value for key, value in found.items() if value is not None and value is not _ABSENT}
        for key, allowed in self.required.items():
            if key in given and given[key] not in allowed:
                raise UserError(f"{where}: {key}={given[key]!r} is not supported; expected {allowed[0]!r}")
        if missing := [key for key in self.keys if key not in given and key not in self.optional]:
            raise UserError(f"{where}: missing {', '.join(missing)}")
        for key, other in self.equal.items():
            if key in given and given[key] != given.get(other):
                raise UserError(f"{where}: {key}={given[key]!r} must equal {other}={given.get(other)!r}")
        return {field: given[key] for key, field in self.keys.items() if key in given}

    def in_words_of_the_file(self, error: Exception, where: str) -> UserError:
        """An error about a field, naming its key."""
        key_of = {field: key for key, field in self.keys.items()}
        words = re.sub(r"\w+", lambda word: key_of.get(word[0], word[0]), str(error))
        return UserError(f"{where}: {words.removeprefix(f'{self.name}: ')}")

    def fill(self, config: Any) -> dict[str, Any]:
        """Key -> value of a config, tables as tables, tuples as lists."""
        values: dict[str, Any] = {}
        for key, field in self.keys.items():
            value = getattr(config, field)
            if key in self.own and value == self.own[key]:
                continue
            table, _, name = key.rpartition(".")
            place = values.setdefault(table, {}) if table else values
            place[name] = list(value) if isinstance(value, tuple) else value
        return values


def _lookup(values: dict[str, Any], key: str, where: str) -> Any:
    table, _, name = key.rpartition(".")
    value = (values[table] if table else values).get(name, _ABSENT)
    try:
        is_short = value is _ABSENT or len(repr(value)) <= _MAX_VALUE_TEXT
    except (ValueError, RecursionError):
        is_short = False
    if not is_short:
        raise UserError(f"{where}: {key} takes more than {_MAX_VALUE_TEXT} characters; no such value is sensible")
    return value
