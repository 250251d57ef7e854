"""Serves a checkpoint as a worker of NVIDIA Dynamo, whose frontend has HTTP, routes and parsers of its own.

pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
pip install aiohttp msgspec 'pydantic<=2.13.5' prometheus-client pyzmq redis tqdm uvloop zstandard
export DYN_FILE_KV=$(mktemp -d)                   # where workers and frontends find each other
export DYN_TCP_RPC_HOST=127.0.0.1 DYN_TCP_RESPONSE_STREAM_HOST=127.0.0.1
python -m dynamo.frontend --http-host 127.0.0.1 --http-port 8000 --discovery-backend file &
scripts/dynamo_worker.py &                        # as often as there are GPUs, or parts of a CPU

The checkpoint must be a Hugging Face directory, which Dynamo reads, too.
"""

from __future__ import annotations

import os
import sys

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser
from mimo_jax.errors import UserError
from mimo_jax.serving.launch import add_engine_options


def parser() -> Parser:
    parser = Parser(description=__doc__)
    add_engine_options(parser)
    group = parser.add_argument_group("Dynamo")
    group.add_argument("--namespace", default="dynamo")
    group.add_argument("--discovery-backend", choices=("file", "etcd", "kubernetes"), default="file")
    group.add_argument("--host", default="127.0.0.1", help="this machine's address for frontends")
    group.add_argument("--tool-call-parser", help="one of Dynamo's; qwen3_coder is the nearest to MiMo's own")
    group.add_argument("--reasoning-parser", help="one of Dynamo's; qwen3 is the nearest to MiMo's own")
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    for name in ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_SYSTEM_HOST"):
        os.environ.setdefault(name, args.host)
    try:
        from dynamo.common.backend.run import run
    except ModuleNotFoundError as error:
        raise UserError(f"Dynamo: {error.name} is not installed; --help says how") from None
    from mimo_jax.serving.dynamo import DynamoEngine

    run(DynamoEngine, args)


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
