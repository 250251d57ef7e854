"""Byte-level BPE in the Qwen2 family's form, by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from mimo_jax.errors import UserError

END_OF_TEXT, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, "<think>", "</think>", MASK)

# Qwen2's pre-tokenizer: contractions, words, single digits, punctuation runs, line ends, spaces.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learns merges on `texts`; the special tokens take the first ids."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a `tokenizer.json`."""
        if not path.is_file():
            raise UserError(f"{path}: not found; a checkpoint folder needs its tokenizer")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer ({error})") from None

    def save(self, path: Path) -> None:
        self.backend.save(str(path))

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; incomplete UTF-8 shows as U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def id_of(self, token: str) -> int:
        """The id of a token that must exist."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"tokenizer: has no token {token!r}")
        return token_id

    def byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for; special tokens stand for none."""
        lengths = [0] * self.vocab_size
        special = {token_id for token_id, token in self.backend.get_added_tokens_decoder().items() if token.special}
        for token, token_id in self.backend.get_vocab().items():
            lengths[token_id] = 0 if token_id in special else len(token)
        return lengths
