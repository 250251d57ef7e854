"""Serves a checkpoint by the OpenAI API: chat and text completions, streams, tools, structured output.

scripts/serve.py                                          # the bundled model, for this machine alone
scripts/serve.py --model path/to/checkpoint --slots 8 --served-name xiaomi/mimo
scripts/serve.py --host 0.0.0.0 --api-key-file keys.txt   # a line of the file is ACCOUNT KEY, or just KEY
scripts/serve.py --api-key-file keys.txt --account-entries 10 --sessions 4    # a trial: four accounts at once
"""

from __future__ import annotations

import sys

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser
from mimo_jax.serving.launch import (
    account_rules,
    add_account_options,
    add_engine_options,
    add_http_options,
    app_of,
    check_reach,
    engine_of,
    example,
    need_server_packages,
    read_keys,
)


def parser() -> Parser:
    parser = Parser(description=__doc__)
    add_engine_options(parser)
    add_http_options(parser)
    add_account_options(parser)
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    keys = read_keys(args)
    check_reach(args.host, keys)
    rules = account_rules(args)
    need_server_packages()
    from mimo_jax.serving.http.server import Server, listen

    with listen(args.host, args.port) as listener:  # an address that is taken is no reason to load a model
        with engine_of(args, rules) as engine:
            service, app = app_of(args, keys, engine)
            host, port = listener.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(f"{service.name} listens on {url}, for prompts and replies of {service.context:,} tokens together")
            print(example(url, bool(keys)), flush=True)
            Server(app, service, args.grace).run([listener])


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
