"""What a reply took, and how drafting went, under a name of its own.

OpenAI's `accepted_prediction_tokens` are of predictions that a client sends; a server's own drafts are none.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mimo_jax.serving.http.sampling import FLAG, Fields, read_fields
from mimo_jax.serving.http.turn import Run

STREAM_OPTIONS = {"include_usage": FLAG, "continuous_usage_stats": FLAG}


@dataclasses.dataclass(frozen=True)
class Tokens:
    prompt: int
    cached: int  # of the prompt
    completion: int
    reasoning: int  # of the completion
    media: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of the prompt: image, audio, video

    @property
    def total(self) -> int:
        return self.prompt + self.completion


def tokens_of(run: Run) -> Tokens:
    """Of all prompts and choices. A prompt counts once, however many choices continue it."""
    media = sum((turn.request.media.counts for turn in run.turns if turn.request.media), Counter[str]())
    return Tokens(
        media=media,
        prompt=sum(len(turn.request.prompt) for turn in run.turns),
        cached=sum(choice.usage.cached_tokens for choice in run.choices[:: run.samples] if choice.usage),
        completion=sum(choice.used for choice in run.choices),
        reasoning=sum(choice.reasoning_tokens for choice in run.choices),
    )


class StreamUsage:
    """Where a stream says what it takes, and how drafting goes: at its end, and with vLLM's `continuous_usage_stats` in
    every chunk.

    Chunks of drafted text hold several tokens each; without the latter, clients cannot count them.
    """

    def __init__(self, fields: Fields) -> None:
        options = read_fields(fields.get("stream_options", {}), STREAM_OPTIONS, "stream_options.")
        self.is_included = options.get("include_usage", False)
        self._is_continuous = options.get("continuous_usage_stats", False)

    def of_chunk(self, run: Run) -> dict[str, Any]:
        if not self.is_included:
            return {}
        return counts(run) if self._is_continuous else {"usage": None}


def counts(run: Run) -> dict[str, Any]:
    """Up to now."""
    return {"usage": usage_of(run), **speculation(run)}


def usage_of(run: Run) -> dict[str, Any]:
    tokens = tokens_of(run)
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.total,
        "prompt_tokens_details": {
            "cached_tokens": tokens.cached,
            **{f"{kind}_tokens": count for kind, count in tokens.media.items()},
        },
        "completion_tokens_details": {"reasoning_tokens": tokens.reasoning},
    }


def speculation(run: Run) -> dict[str, Any]:
    """A reply's `metrics`. Rates are per draft block, so each position's is at most that of the one before it."""
    choices = [choice.usage.acceptance for choice in run.choices if choice.usage]
    drafted = [choice for choice in choices if choice.rounds and choice.tested]
    if not drafted:
        return {}
    rounds = sum(choice.rounds for choice in drafted)
    accepted = [sum(position) for position in zip(*(choice.accepted for choice in drafted))]
    found = {
        "mean_acceptance_length": sum(choice.tokens for choice in drafted) / rounds,
        "num_spec_steps": rounds,
        "num_draft_tokens": rounds * len(accepted),
        "num_accepted_draft_tokens": sum(accepted),
        "acceptance_rate_per_position": [count / rounds for count in accepted],
    }
    return {"metrics": {"speculative_decoding": found}}
