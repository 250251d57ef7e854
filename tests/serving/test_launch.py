"""The options that commands which serve share."""

import threading

import pytest

from mimo_jax.cli.options import Parser
from mimo_jax.errors import UserError
from mimo_jax.serving.accounts import AccountLimit
from mimo_jax.serving.launch import account_rules, add_account_options, add_engine_options, engine_of
from mimo_jax.serving.requests import TokenRequest


def parsed(*arguments: str):
    parser = Parser()
    add_engine_options(parser)
    add_account_options(parser)
    return parser.parse_args(arguments)


def test_an_engine_is_as_its_options_say():
    """Slots, context, cache; and what an account may have, for whoever submits."""
    args = parsed(*"--slots 1 --context 64 --cache-mb 3 --account-entries 1 --sessions 1".split())
    with engine_of(args, account_rules(args)) as engine:
        stats = engine.stats()
        assert (stats.slots, engine.context, stats.cache_limit) == (1, 64, 3_000_000)
        over = threading.Event()
        engine.submit(
            TokenRequest((5,), max_tokens=60, stop_ids=(), account="ann"), lambda update: update.finish and over.set()
        )
        with pytest.raises(AccountLimit, match="at most 1 requests may be queued"):
            engine.submit(TokenRequest((5,), account="ann"), lambda update: None)
        with pytest.raises(AccountLimit, match="no session is free, place 1 in line"):
            engine.submit(TokenRequest((5,), account="bob"), lambda update: None)
        assert over.wait(30)


def test_sessions_are_in_minutes():
    """As UltraSpeed's trial says it; and there are none unless they are asked for."""
    rules = account_rules(parsed(*"--sessions 2 --session-minutes 20 --idle-minutes 0.5".split()))
    assert (rules.entries, rules.sessions, rules.session_seconds, rules.idle_seconds) == (None, 2, 1200, 30)
    rules = account_rules(parsed("--sessions", "2"))
    assert (rules.session_seconds, rules.idle_seconds) == (1800, 300)
    assert account_rules(parsed()).sessions is None
    with pytest.raises(UserError, match="--session-minutes and --idle-minutes need --sessions"):
        account_rules(parsed("--idle-minutes", "3"))
