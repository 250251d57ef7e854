"""The vocabulary of a GGUF as the files of a checkpoint: its tokenizer, chat template and ends of texts."""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_jax.checkpoint.export import json_bytes
from mimo_jax.checkpoint.files.gguffile import CONTROL, UNKNOWN, USER_DEFINED, GgufFile
from mimo_jax.errors import UserError, check_whole
from mimo_jax.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_MODEL = "gpt2"  # byte-level BPE
# What ends a turn or a text, whatever else the file calls its end.
_ENDS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>")
# Other files' name of a token -> the GGUF's.
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _split(pattern: str) -> list[dict[str, Any]]:
    """The pre-tokenizer of a pattern whose matches are words."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut into words before any merge, by the name that llama.cpp has for it.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "llama-bpe": _split(_WORDS % r"\p{N}{1,3}"),
    "qwen2": _split(_WORDS % r"\p{N}"),
}
_AS_IT_IS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}  # how added tokens are found
_WHOLE_WORDS = ("llama-bpe",)  # where a word that is a token is that token, whatever its merges


class Vocabulary:
    """What a GGUF says of its tokens; what is wrong with that is a `UserError` that names the field."""

    def __init__(self, file: GgufFile) -> None:
        self._path, self._values = file.path, file.values
        file.one_of(f"{_PREFIX}model", (_MODEL,))
        self._pre = file.one_of(f"{_PREFIX}pre", PRE_TOKENIZERS)
        self._tokens, self._merges = self._texts("tokens"), self._texts("merges")
        kinds = self._values.get(f"{_PREFIX}token_type")
        if not isinstance(kinds, np.ndarray) or kinds.shape != (self.size,) or kinds.dtype.kind not in "iu":
            raise self._wrong("token_type", f"must be a list of {self.size} whole numbers, one for each token")
        self._kinds = kinds.tolist()

    @property
    def size(self) -> int:
        return len(self._tokens)

    def token_id(self, name: str) -> int | None:
        """The id of "bos", "eos" or another, if there is one."""
        value = self._values.get(f"{_PREFIX}{name}_token_id")
        if value is None:
            return None
        given = value if isinstance(value, int) else reprlib.repr(value)
        check_whole(str(self._path), 0, self.size - 1, **{f"{_PREFIX}{name}_token_id": given})
        return value

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...] | None:
        """All that end a text."""
        found = {i for i, kind in enumerate(self._kinds) if kind == CONTROL and self._tokens[i] in _ENDS}
        named = (self.token_id(name) for name in ("eos", "eot"))
        return tuple(sorted(found.union(index for index in named if index is not None))) or None

    def files(self, sampling: Mapping[str, Any] | None = None) -> dict[str, bytes]:
        """tokenizer.json, tokenizer_config.json with the chat template, and generation_config.json with `sampling`."""
        text = json.dumps(self._tokenizer(), ensure_ascii=False)
        Tokenizer.parse(text, f"{self._path}: {_PREFIX}*")
        ids = {"bos": self.token_id("bos"), "eos": self.end_ids, "pad": self.token_id("padding")}
        given = {f"{name}_token_id": value for name, value in ids.items() if value is not None}
        return {
            "tokenizer.json": text.encode(),
            "tokenizer_config.json": json_bytes(self._tokenizer_config()),
            "generation_config.json": json_bytes({**given, **(sampling or {})}),
        }

    def _tokenizer(self) -> dict[str, Any]:
        vocab = {token: index for index, token in enumerate(self._tokens)}
        if len(vocab) != self.size:
            raise self._wrong("tokens", "has a token twice")
        added = [
            {"id": index, "content": self._tokens[index], "special": kind != USER_DEFINED, **_AS_IT_IS}
            for index, kind in enumerate(self._kinds)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
        merges = [merge.split(" ") for merge in self._merges]
        for merge in merges:
            if len(merge) != 2 or not vocab.keys() >= {*merge, "".join(merge)}:
                found = reprlib.repr(" ".join(merge))
                raise self._wrong("merges", f"has {found}; expected two tokens that make a third")
        return {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[self._pre]},
            "decoder": _byte_level(use_regex=True),
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": self._pre in _WHOLE_WORDS},
        }

    def _tokenizer_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for ours, theirs in _NAMED.items():
            if (index := self.token_id(theirs)) is not None:
                config[ours] = self._tokens[index]
        template = self._values.get("tokenizer.chat_template")
        if isinstance(template, str):
            config["chat_template"] = template
        return config

    def _texts(self, name: str) -> list[str]:
        value = self._values.get(_PREFIX + name)
        if not isinstance(value, list) or not value:
            raise self._wrong(name, f"is {reprlib.repr(value)}; expected a list of texts")
        return value

    def _wrong(self, name: str, what: str) -> UserError:
        return UserError(f"{self._path}: {_PREFIX}{name} {what}")
