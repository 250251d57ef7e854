"""A conversation, in whichever API's words it came, becomes a turn."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_jax.serving.dialect import Parser, schemas_of
from mimo_jax.serving.grammar import Grammar, Grammars
from mimo_jax.serving.http.sampling import Fields, stop_strings, token_request
from mimo_jax.serving.http.service import Service
from mimo_jax.serving.http.turn import Turn
from mimo_jax.serving.template import Rendered


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages and tools as `messages.normalized` and `checked_tools` give them."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()  # none: tags of calls are plain text
    choice: str | Mapping[str, Any] = "auto"  # auto, required, or the name of the one tool to be called
    is_parallel: bool = True  # several calls in a reply
    thinking: bool | None = None  # None: as the template has it
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more variables of the template
    schema: Mapping[str, Any] | None = None  # of the answer; None: text
    is_strict: bool = False  # a schema that cannot be enforced is refused

    def rendered(self, service: Service) -> Rendered:
        return service.template.render(self.messages, self.tools, self.thinking, self.options)

    def ids(self, service: Service) -> Sequence[int]:
        """Of the prompt, without running towers."""
        return service.encode(self.rendered(service)).ids

    def turn(self, service: Service, fields: Fields, account: str, top_logprobs: int | None = None) -> Turn:
        """Renders and compiles, for which no event loop should wait."""
        rendered = self.rendered(service)
        encoded = service.encode(rendered)
        grammar = self._grammar(service.grammars)
        request = dataclasses.replace(
            token_request(service, fields, encoded.ids, account),
            media=service.media_of(encoded),
            top_logprobs=top_logprobs,
            matcher=functools.partial(grammar.matcher, rendered.thinks) if grammar else None,
        )
        parser = functools.partial(Parser, rendered.thinks, schemas_of(self.tools), self.is_parallel)
        return Turn(request, stop_strings(fields), rendered.thinks, parser)

    def _grammar(self, grammars: Grammars) -> Grammar | None:
        if self.choice != "auto":
            return grammars.tool_calls(self.tools, self.choice, self.is_parallel)
        if self.schema is None:
            return None
        if self.tools:
            return grammars.tool_calls_or_json(self.tools, self.is_parallel, self.schema, self.is_strict)
        return grammars.json_schema(self.schema, self.is_strict)
