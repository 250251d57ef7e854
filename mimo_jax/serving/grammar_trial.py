"""Compiles a grammar in a process of its own: what time, memory or stack that takes is known only then.

The library's own limits do not count all of it: references with sibling keys, patterns of keys and multiples can make a
small schema take hours.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

# A row of a schema's state holds some items per key that may come next.
LIMITS = LLParserLimits(max_items_in_row=50_000, max_lexer_states=50_000, verbose_errors=False)
_PLACE = re.compile(r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?")
SECONDS = 2  # of a processor, so that a busy machine refuses nothing more
GIB = 1


def compile_apart(source: str, vocab_size: int) -> str:
    """What is wrong with a grammar; empty if nothing is."""
    command = [sys.executable, "-P", __file__, str(vocab_size)]
    child = subprocess.run(command, input=source.encode(), capture_output=True, check=False)
    if child.returncode == 0:
        return child.stdout.decode()
    last = child.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"signal {-child.returncode}"]
    return f"takes more than {SECONDS} s or {GIB} GiB to compile ({last[0]})"


def failure(matcher: LLMatcher) -> str:
    """Why there is no first mask; some grammars are found wanting only then."""
    matcher.compute_bitmask()
    return reason(matcher)


def reason(matcher: LLMatcher) -> str:
    """What is wrong, in one line and without a place in a source that no user has seen; empty if nothing is."""
    lines = [_PLACE.sub("", line) for line in matcher.get_error().splitlines()]
    line = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    return "there is no text that it allows" if line.startswith("NoExtension") else line[:200]


class _Bytes:
    """A vocabulary that costs little: all bytes, and as many more tokens as a grammar may name."""

    bos_token_id, special_token_ids = None, ()

    def __init__(self, vocab_size: int) -> None:
        self.tokens: Sequence[bytes] = [*(bytes([byte]) for byte in range(256)), *[b""] * vocab_size]
        self.eos_token_id = 256

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (GIB << 30, GIB << 30))
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(int(sys.argv[1]))))
    matcher = LLMatcher(tokenizer, sys.stdin.buffer.read().decode(), log_level=0, limits=LIMITS)
    sys.stdout.buffer.write(failure(matcher).encode())


if __name__ == "__main__":
    _main()
