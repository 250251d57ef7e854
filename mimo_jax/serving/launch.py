"""What the commands that serve have in common: their options, and the engine and the app that these describe."""

from __future__ import annotations

import argparse
import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_jax.cli.options import add_draft_options, draft_options, need_packages
from mimo_jax.cli.values import folder, real, whole
from mimo_jax.errors import UserError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from mimo_jax.serving.accounts import AccountRules
    from mimo_jax.serving.engine import Engine
    from mimo_jax.serving.http.service import Service

MOST_SLOTS, MOST_TOKENS, MOST_MB, MOST_ENTRIES = 1024, 10**7, 10**6, 10**6
MOST_GRACE, MOST_MINUTES = 3600.0, 10_000.0
MOST_KEY_BYTES = 1 << 20
MOST_MEDIA_BYTES = 16 << 20  # of a request to a model that takes pictures: the largest one in base64, and text
EXAMPLE = """curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\
  -d '{{"messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 64, "stream": true}}'"""


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The options that `engine_of` reads."""
    parser.add_argument(
        "--model", help="checkpoint directory, Hugging Face or Orbax, or smollm2 (default: the bundled model)"
    )
    parser.add_argument("--served-name", help="what clients call the model (default: the directory's name)")
    parser.add_argument("--slots", type=whole(1, MOST_SLOTS), default=4, help="texts that are generated together")
    parser.add_argument("--context", type=whole(2, MOST_TOKENS), help="tokens of a prompt and its reply together")
    parser.add_argument(
        "--cache-mb", type=whole(0, MOST_MB), default=256, help="memory for what prompts begin with; 0: read all anew"
    )
    add_draft_options(parser)


def add_account_options(parser: argparse.ArgumentParser) -> None:
    """The options that `account_rules` reads."""
    group = parser.add_argument_group("accounts", "Each key is one; without keys, all clients together are one.")
    group.add_argument("--account-entries", type=whole(1, MOST_ENTRIES), help="requests an account has at once")
    group.add_argument("--sessions", type=whole(1, MOST_ENTRIES), help="accounts at once; others wait in line")
    minutes = {"type": real(0, MOST_MINUTES), "metavar": "MINUTES"}
    group.add_argument("--session-minutes", **minutes, help="of a session, once others wait (default: 30)")
    group.add_argument("--idle-minutes", **minutes, help="after which a session is lost (default: 5)")


def add_http_options(parser: argparse.ArgumentParser) -> None:
    """The options that `read_keys`, `check_reach` and `app_of` read."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than this machine's need keys"
    )
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="0: any that is free")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--api-key", help="what clients must send; other users of this machine can see it here")
    keys.add_argument("--api-key-file", help="file with a key in each line, after its account's name if it has one")
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        help="web page whose scripts may call; repeat it (default: none)",
    )
    parser.add_argument(
        "--media-files", type=folder, metavar="DIR", help="folder below which messages may name files (default: none)"
    )
    parser.add_argument("--metrics-prefix", default="mimo:", help="of names in /metrics; vllm: for vLLM's dashboards")
    parser.add_argument(
        "--grace", type=real(0, MOST_GRACE), default=30.0, help="seconds for what is under way when the server is ended"
    )


def read_keys(args: argparse.Namespace) -> dict[str, str]:
    """Keys by account."""
    if args.api_key is not None:
        return {"default": args.api_key}
    if args.api_key_file is None:
        return {}
    with open(args.api_key_file, "rb") as file:
        data = file.read(MOST_KEY_BYTES)
    try:
        lines = [line.split() for line in data.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{args.api_key_file}: not valid UTF-8 at byte {error.start}") from None
    keys = {words[0] if len(words) == 2 else f"key-{place}": words[-1] for place, words in enumerate(lines, 1)}
    if not keys or len(keys) < len(lines) or any(len(words) > 2 for words in lines):
        raise UserError(f"{args.api_key_file}: expected lines of ACCOUNT KEY or KEY, each account once")
    return keys


def check_reach(host: str, keys: dict[str, str]) -> None:
    """Whoever can reach the server can use it, unless there are keys."""
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not (is_local or keys):
        raise UserError(f"--host {host}: reaches beyond this machine; give --api-key-file, or --host 127.0.0.1")


def account_rules(args: argparse.Namespace) -> AccountRules:
    from mimo_jax.serving.accounts import AccountRules

    minutes = {"session_seconds": args.session_minutes, "idle_seconds": args.idle_minutes}
    given = {name: 60 * value for name, value in minutes.items() if value is not None}
    if given and args.sessions is None:
        raise UserError("accounts: --session-minutes and --idle-minutes need --sessions")
    return AccountRules(entries=args.account_entries, sessions=args.sessions, **given)


def model_of(args: argparse.Namespace) -> tuple[Path, str]:
    """The checkpoint's directory, and what clients call it."""
    from mimo_jax.loading import BUNDLED, find

    directory = find(args.model or BUNDLED)
    named = None if args.model is None or Path(args.model).is_dir() else args.model
    return directory, args.served_name or named or directory.resolve().name


def engine_of(args: argparse.Namespace, rules: AccountRules | None = None) -> Engine:
    """Loads the checkpoint. Whoever calls this closes the engine."""
    from mimo_jax.cli.memory import return_freed_memory
    from mimo_jax.loading import BUNDLED, load
    from mimo_jax.serving.engine import Engine, Limits

    return_freed_memory()  # prefixes come and go: what they leave would grow for as long as the server runs
    model = load(args.model or BUNDLED, **draft_options(args))
    context = args.context or model.config.max_position
    return Engine(model, Limits(args.slots, context, args.cache_mb * 10**6), rules)


def app_of(args: argparse.Namespace, keys: dict[str, str], engine: Engine) -> tuple[Service, Starlette]:
    from mimo_jax.serving.http.app import AppOptions, create_app
    from mimo_jax.serving.http.limits import LimitOptions
    from mimo_jax.serving.http.service import Service

    service = Service.of(engine.model, engine, *model_of(args), engine.context, args.metrics_prefix, args.media_files)
    limits = LimitOptions() if engine.model.towers is None else LimitOptions(body_bytes=MOST_MEDIA_BYTES)
    return service, create_app(service, AppOptions(keys, args.allow_origin, limits))


def need_server_packages() -> None:
    need_packages("serving", "serve", "jinja2", "llguidance", "starlette", "uvicorn")


def example(url: str, has_keys: bool) -> str:
    """A command to try first."""
    return EXAMPLE.format(url=url, key=" -H 'Authorization: Bearer KEY'" if has_keys else "")
