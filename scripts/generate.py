"""Continues a prompt with a checkpoint, streaming the text; a summary and one line of JSON follow.

scripts/generate.py --prompt "def binary_search(items, target):"
scripts/generate.py --model path/to/checkpoint --prompt-ids 17,42 --temperature 0.7 --top-p 0.95 --seed 3
scripts/generate.py --prompt "def a(" --prompt "class B:"          # a batch
scripts/generate.py --image code.png                               # what a model with towers reads in a picture
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import (
    Parser,
    add_mesh_options,
    add_model_options,
    add_sampling_options,
    load_options,
    mesh_of,
    sampling_of,
)
from mimo_jax.errors import UserError

if TYPE_CHECKING:
    from mimo_jax.decode.sampling import Strategy
    from mimo_jax.generation import Result
    from mimo_jax.loading import Model
    from mimo_jax.media.parts import Part


MEDIA = {"image": "PNG, JPEG or WebP", "audio": "WAV, FLAC, Ogg or MP3", "video": "what FFmpeg reads"}
FEW_ROUNDS = 16  # too few to judge a drafter by
MOST_BYTES = 1 << 24  # of a prompt: a device has no end
SUSPICIOUS_SHARE = 0.25  # of the accepted drafts to expect


def parser() -> Parser:
    parser = Parser(description=__doc__)
    add_model_options(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", action="append", help="text to continue; repeat it for a batch")
    prompt.add_argument("--prompt-ids", action="append", help="comma-separated token ids instead of text")
    prompt.add_argument("--prompt-file", help="file with the text to continue; - for standard input")
    for name, kind in MEDIA.items():
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar="FILE", help=f"shown before the text; {kind}"
        )
    parser.add_argument("--literal", action="store_true", help="names of special tokens in the prompt are plain text")
    parser.add_argument("--max-tokens", type=int, default=128)
    add_sampling_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="text that ends the generation; may be repeated")
    add_mesh_options(parser)
    return parser


def read_prompts(args: argparse.Namespace) -> list[str | list[int]]:
    if args.prompt_ids:
        try:
            return [[int(token) for token in ids.split(",")] for ids in args.prompt_ids]
        except ValueError as error:
            raise UserError(f"--prompt-ids: {error}; expected whole numbers separated by commas") from None
    if args.prompt_file:
        if args.prompt_file == "-" and sys.stdin is None:
            raise UserError("--prompt-file -: standard input is closed")
        file = sys.stdin.buffer if args.prompt_file == "-" else open(args.prompt_file, "rb")
        with file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise UserError(f"{args.prompt_file}: more than {MOST_BYTES} bytes, which no context holds")
        try:
            return [text.decode("utf-8")]
        except UnicodeDecodeError as error:
            raise UserError(f"{args.prompt_file}: not valid UTF-8 at byte {error.start}") from None
    if args.prompt is None and not any(getattr(args, name) for name in MEDIA):
        raise UserError("prompt: missing; give --prompt, --prompt-ids or --prompt-file")
    return args.prompt or [""]


def media_of(args: argparse.Namespace) -> list[Part]:
    from mimo_jax.media.parts import Audio, Image, Video

    kinds = {"image": Image, "audio": Audio, "video": Video}
    return [kinds[name](path) for name in MEDIA for path in getattr(args, name)]


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    prompts, sampling = read_prompts(args), sampling_of(args)
    mesh = mesh_of(args)
    from mimo_jax.decode.sampling import strategy_of
    from mimo_jax.generation import Request, encode_prompt, generate_batch, stream
    from mimo_jax.loading import BUNDLED, load

    strategy = strategy_of(sampling, "sampling") if sampling else None
    model = load(args.model or BUNDLED, mesh=mesh, **load_options(args))
    media = media_of(args)
    encoded = [encode_prompt(model, [*media, prompt] if media else prompt, args.literal) for prompt in prompts]
    requests = [Request(prompt, strategy, args.max_tokens, args.seed, args.stop) for prompt in encoded]
    if len(prompts) > 1:
        results = generate_batch(model, requests)
        for prompt, result in zip(prompts, results):
            print(f"{show(model, prompt)}{result.text}\n{'-' * 40}")
    else:
        print(show(model, prompts[0]), end="", flush=True)
        results = []
        for piece in stream(model, requests[0]):
            print(piece.text, end="", flush=True)
            results = [piece.result] if piece.result else []
        print()
    print_summary(model, strategy, results)


def show(model, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


def describe(strategy: Strategy) -> str:
    """A strategy in the words of the options."""
    named = {name: value for name, value in dataclasses.asdict(strategy).items() if value is not None}
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in named.items()) or "greedy"


def print_summary(model: Model, strategy: Strategy | None, results: list[Result]) -> None:
    """A card for people on standard error, one line of JSON on standard output."""
    from mimo_jax.layouts import LAYOUTS

    timing = results[0].timing
    rounds = sum(row.acceptance.rounds for row in results)
    tokens_per_round = sum(row.acceptance.tokens for row in results) / max(rounds, 1)
    card = [
        ("prompt", f"{timing.prompt_tokens} tokens, {timing.prompt_tokens_per_second:,.0f} tokens/s"),
        ("generated", f"{timing.generated_tokens} tokens, {timing.tokens_per_second:,.0f} tokens/s"),
        ("per round", f"{tokens_per_round:.2f} tokens of at most {model.drafter.block_size}"),
        ("first token", f"{timing.first_token_seconds:.2f} s"),
        ("compilation", f"{timing.compile_seconds:.2f} s"),
        ("peak memory", f"{timing.peak_bytes / 1e6:,.0f} MB"),
        ("sampling", describe(model.strategy if strategy is None else strategy)),
        ("weights", LAYOUTS[model.layout]),
    ]
    print("\n" + "\n".join(f"{name:>12}  {value}" for name, value in card), file=sys.stderr)
    expected = model.drafter.expected
    if expected and rounds >= FEW_ROUNDS and tokens_per_round < 1 + SUSPICIOUS_SHARE * (expected - 1):
        print(
            f"drafter: {tokens_per_round:.2f} tokens per round, {expected:.2f} expected; "
            "it was probably trained for other weights (the text is right all the same)",
            file=sys.stderr,
        )
    record = {
        **dataclasses.asdict(timing),
        "prompt_tokens_per_second": timing.prompt_tokens_per_second,
        "tokens_per_second": timing.tokens_per_second,
        "tokens_per_round": tokens_per_round,
        "finish_reasons": [result.finish_reason for result in results],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
