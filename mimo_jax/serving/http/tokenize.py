"""POST /tokenize and /detokenize: how many tokens a prompt takes, and which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mimo_jax.serving.http.chat import CHAT, conversation
from mimo_jax.serving.http.errors import bad_request
from mimo_jax.serving.http.sampling import TEXT, TOKENS, check_tokens, naming, read_fields
from mimo_jax.serving.http.service import Service

TOKENIZE = {**CHAT, "prompt": TEXT, "content": TEXT}  # two names for a text, by different servers
DETOKENIZE = {"model": TEXT, "tokens": TOKENS}


def tokenize(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """Of a text, in which names of special tokens are those tokens, or of what a chat's body would be rendered to."""
    fields = read_fields(body, TOKENIZE)
    service.check_name(fields.get("model"))
    texts = [fields[name] for name in ("prompt", "content") if name in fields]
    if len(texts) + ("messages" in fields) != 1:
        raise bad_request("one of prompt, content and messages is needed", "prompt")
    with naming(TOKENIZE):
        ids = service.tokenizer.encode(texts[0]) if texts else conversation(fields, service.attachments).ids(service)
    return {"tokens": list(ids), "count": len(ids), "max_model_len": service.context}


def detokenize(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """The text, in which special tokens are their names."""
    fields = read_fields(body, DETOKENIZE)
    service.check_name(fields.get("model"))
    tokens = check_tokens(fields.get("tokens", []), service.vocab_size, "tokens")
    return {"prompt": b"".join(map(service.spelling.bytes_of, tokens)).decode(errors="replace")}
