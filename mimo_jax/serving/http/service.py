"""What routes share: the model's texts, the engine, and its name."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimo_jax.decode.sampling import Strategy
from mimo_jax.generation import encode_pieces
from mimo_jax.loading import Model
from mimo_jax.media.prompt import Encoded, Media
from mimo_jax.serving.attachments import Attachments
from mimo_jax.serving.dialect import CALL, CLOSE, OPEN
from mimo_jax.serving.grammar import Grammars
from mimo_jax.serving.http.errors import not_found
from mimo_jax.serving.http.logprobs import Spelling
from mimo_jax.serving.http.metrics import Metrics
from mimo_jax.serving.requests import Busy, Serving
from mimo_jax.serving.template import ChatTemplate, Rendered
from mimo_jax.tokenizer import Tokenizer


@dataclasses.dataclass
class Service:
    """`context` is how many tokens a prompt and its continuation may have together."""

    name: str
    engine: Serving
    tokenizer: Tokenizer
    template: ChatTemplate
    grammars: Grammars
    metrics: Metrics
    spelling: Spelling
    strategy: Strategy
    stop_ids: tuple[int, ...]
    vocab_size: int
    context: int
    thinking_begin: int | None  # tokens by which the model begins to think, and after which it does no more
    thinking_ends: frozenset[int]
    attachments: Attachments
    encode: Callable[[Rendered], Encoded]
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    is_draining: bool = False  # takes no more work
    _towers: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @classmethod
    def of(
        cls,
        model: Model,
        engine: Serving,
        directory: Path,
        name: str,
        context: int,
        metrics_prefix: str = "mimo:",
        files: Path | None = None,
    ) -> Service:
        """A model, which was loaded from `directory`, as `engine` runs it. Messages may name `files` below a folder."""
        tokenizer, config = model.tokenizer, model.config
        ends = (tokenizer.added_tokens.get(tag) for tag in (CLOSE, CALL))
        return cls(
            name=name,
            engine=engine,
            tokenizer=tokenizer,
            template=ChatTemplate.load(directory, tokenizer),
            grammars=Grammars(tokenizer, config.vocab_size, model.stop_ids),
            metrics=Metrics(name, metrics_prefix),
            spelling=Spelling(tokenizer),
            strategy=model.strategy,
            stop_ids=model.stop_ids,
            vocab_size=config.vocab_size,
            context=context,
            thinking_begin=tokenizer.added_tokens.get(OPEN),
            thinking_ends=frozenset(token for token in ends if token is not None),
            attachments=Attachments.of(config, files),
            encode=lambda rendered: encode_pieces(model, rendered.pieces),
        )

    def media_of(self, encoded: Encoded) -> Media | None:
        """Runs the towers, for one request at a time: of many at once, pictures would take too much memory."""
        with self._towers:
            return encoded.media

    def check_open(self) -> None:
        if self.is_draining:
            raise Busy("the server is closing")

    def check_name(self, name: str | None) -> None:
        """Nothing else is served; a body need not name it."""
        if name not in (None, self.name):
            raise not_found(f"there is no model {name!r}; this server has {self.name!r}", "model_not_found")

    def head(self, prefix: str, object: str) -> dict[str, Any]:
        """What every reply, and every chunk of one, begins with."""
        return {
            "id": prefix + secrets.token_hex(16),
            "object": object,
            "created": int(time.time()),
            "model": self.name,
            "system_fingerprint": f"fp_{self.created:x}",  # another one once the server was started anew
        }

    def model_card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mimo-jax",
            "max_model_len": self.context,
        }
