"""Talks with a checkpoint in a terminal; /help lists the commands. Where input comes from a pipe, each line is a turn.

scripts/chat.py --system "Answer in one sentence."
scripts/chat.py --model path/to/checkpoint --temperature 0.7 --no-thinking
scripts/chat.py --model smollm2                          # one that knows English; `make chat MODEL=smollm2` installs it
printf '%s\\n' "What is a ring buffer?" "Show one in Python." "/save talk.json" | scripts/chat.py

Answers go to standard output, with one line of JSON at the end; all else goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import (
    Parser,
    add_model_options,
    add_sampling_options,
    load_options,
    need_packages,
    sampling_of,
)
from mimo_jax.cli.values import SEED, whole
from mimo_jax.errors import UserError

if TYPE_CHECKING:
    from mimo_jax.serving.session import Session, Turn

PROMPT = "> "
ENDS = {"length": "cut by its limit", "cancelled": "stopped"}


def parser() -> Parser:
    parser = Parser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--system", default="", help="what the model is told before the conversation")
    parser.add_argument("--max-tokens", type=whole(1), default=4096, help="of an answer, as far as the context goes")
    parser.add_argument("--context", type=whole(2), default=4096, help="tokens of a conversation, if the model can")
    add_sampling_options(parser)
    parser.add_argument("--seed", type=whole(0, SEED), default=0)
    parser.add_argument("--no-thinking", action="store_true", help="where the checkpoint's template knows of thinking")
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    need_packages("chat", "serve", "jinja2")
    if sys.stdin is None:
        raise UserError("standard input is closed; what is said is read there")
    sampling = sampling_of(args)
    from mimo_jax.decode.sampling import strategy_of
    from mimo_jax.loading import BUNDLED, find, load
    from mimo_jax.serving.engine import Engine, Limits
    from mimo_jax.serving.requests import TokenRequest
    from mimo_jax.serving.session import Session
    from mimo_jax.serving.template import ChatTemplate

    strategy = strategy_of(sampling, "sampling") if sampling else None
    request = TokenRequest((), args.max_tokens, strategy, args.seed)
    model = load(args.model or BUNDLED, **load_options(args))
    template = ChatTemplate.load(find(args.model or BUNDLED), model.tokenizer)
    thinking = False if args.no_thinking else None
    engine = Engine(model, Limits(slots=1, context=args.context))
    try:
        session = Session(engine, model, template, request, engine.context, thinking, args.system)
        converse(session)
    finally:
        engine.close()
    print(json.dumps(session.totals()))


def converse(session: Session) -> None:
    """Takes turns until the input ends. What is wrong with one is said, and the next may be better."""
    from mimo_jax.serving.requests import TooLong
    from mimo_jax.serving.session import obey

    for line in lines():
        try:
            if line.startswith("/"):
                tell(obey(session, line))
            elif line.strip():
                show(session, line)
        except TooLong as error:
            tell(f"{error}; /reset begins a new one")
        except UserError as error:
            tell(str(error))


def lines() -> Iterator[str]:
    """What is typed or piped in, until that ends, or Ctrl-C at the prompt."""
    is_typed = sys.stdin.isatty() and sys.stdout.isatty()
    if is_typed:
        import readline  # noqa: F401  gives `input` a history
    stdin: Any = sys.stdin
    stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused like any other message
    while True:
        try:
            yield input(PROMPT if is_typed else "")
        except (EOFError, KeyboardInterrupt):
            if is_typed:
                print()
            return


def show(session: Session, line: str) -> None:
    """Streams the answer, thinking dimmed; Ctrl-C ends it."""
    from mimo_jax.serving.dialect import Part

    color_system = ColorSystem.STANDARD if Console().color_system else None
    styles, part = {Part.THINKING: Style(dim=True)}, None
    with on_interrupt(session.stop):
        for piece in session.answer(line):
            if part not in (None, piece.part):
                print()
            part = piece.part
            print(styles.get(part, Style.null()).render(piece.text, color_system=color_system), end="", flush=True)
    print(flush=True)
    tell(describe(session.turns[-1]))


def describe(turn: Turn) -> str:
    usage = turn.usage
    rate = usage.generated_tokens / max(usage.decode_seconds, 1e-9)
    numbers = (
        f"{usage.generated_tokens} tokens, {rate:,.0f} tokens/s, {usage.acceptance.tokens_per_round:.2f} per round"
    )
    return ", ".join([numbers, *filter(None, [ENDS.get(turn.finish)])])


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C within calls `action`; the next, and those outside, do what they did before."""
    before = signal.getsignal(signal.SIGINT)

    def once(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        action()

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
