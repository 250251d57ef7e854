"""Serves a checkpoint by several processes behind one address, with Ray Serve: copies of what scripts/serve.py serves.

scripts/serve_replicas.py --replicas 2
scripts/serve_replicas.py --replicas 1 --most-replicas 4                           # more while there is much to do
scripts/serve_replicas.py --api-key-file keys.txt --sticky-header authorization    # an account stays with its replica
scripts/serve_replicas.py --address auto --gpus 1 --replicas 8                     # on the machines of a Ray cluster

Each replica has slots, a prefix cache, account rules and metrics of its own.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from typing import Any

from mimo_jax.cli.guard import enable_compilation_cache, main_guard
from mimo_jax.cli.options import Parser, need_packages
from mimo_jax.cli.values import real, whole
from mimo_jax.errors import UserError
from mimo_jax.serving.launch import (
    account_rules,
    add_account_options,
    add_engine_options,
    add_http_options,
    app_of,
    check_reach,
    engine_of,
    example,
    model_of,
    need_server_packages,
    read_keys,
)

MOST_REPLICAS, MOST_DEVICES, MOST_SECONDS = 1024, 1024, 3600.0
APP, DEPLOYMENT = "mimo", "engine"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


def parser() -> Parser:
    parser = Parser(description=__doc__)
    add_engine_options(parser)
    add_http_options(parser)
    add_account_options(parser)
    group = parser.add_argument_group("replicas")
    group.add_argument("--replicas", type=whole(1, MOST_REPLICAS), default=1, help="at the start, and at least")
    group.add_argument("--most-replicas", type=whole(1, MOST_REPLICAS), help="while requests outnumber slots")
    group.add_argument(
        "--scale-seconds", type=real(0, MOST_SECONDS), default=30.0, help="that they must do so before there are more"
    )
    group.add_argument("--sticky-header", help="requests with the same value of this header go to the same replica")
    group.add_argument("--cpus", type=real(0, MOST_DEVICES), default=1.0, help="that Ray sets aside for a replica")
    group.add_argument("--gpus", type=whole(0, MOST_DEVICES), default=0, help="that a replica sees")
    group.add_argument(
        "--address",
        default="local",
        help="of a Ray cluster that serves nothing else, or auto (default: a new one)",
    )
    return parser


class Replica:
    """An engine with its app, in a process of Ray's."""

    def __init__(self, args: argparse.Namespace, keys: dict[str, str]) -> None:
        enable_compilation_cache()
        self._engine = engine_of(args, account_rules(args))
        self._app = app_of(args, keys, self._engine)[1]

    def __serve_build_asgi_app__(self):
        return self._app

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if not self._engine.stats().is_alive:
            raise RuntimeError("the engine has failed")


def deployment_options(args: argparse.Namespace) -> dict[str, Any]:
    from mimo_jax.serving.http.limits import LimitOptions

    concurrency = LimitOptions().concurrency  # beyond which a replica itself refuses
    options: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": concurrency,
        "max_queued_requests": concurrency,
        "graceful_shutdown_timeout_s": args.grace,
        "ray_actor_options": {"num_cpus": args.cpus, "num_gpus": args.gpus},
    }
    if args.sticky_header:
        from ray.serve.config import RequestRouterConfig

        options["request_router_config"] = RequestRouterConfig(request_router_class=ROUTER)
    if args.most_replicas is None:
        return {**options, "num_replicas": args.replicas}
    scale = {
        "min_replicas": args.replicas,
        "initial_replicas": args.replicas,
        "max_replicas": args.most_replicas,
        "target_ongoing_requests": args.slots,
        "upscale_delay_s": args.scale_seconds,
    }
    return {**options, "autoscaling_config": scale}


def check(args: argparse.Namespace) -> None:
    account_rules(args)
    if args.most_replicas is not None and args.most_replicas < args.replicas:
        raise UserError(f"--most-replicas {args.most_replicas}: less than --replicas {args.replicas}")
    if args.port == 0:
        raise UserError("--port 0: Ray Serve needs the number of a port")


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    keys = read_keys(args)
    check_reach(args.host, keys)
    check(args)
    need_server_packages()
    need_packages("replicas", "replicas", "ray")
    from mimo_jax.serving.http.server import listen

    listen(args.host, args.port).close()  # Ray would say it in sixty lines
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if args.sticky_header:
        os.environ["RAY_SERVE_SESSION_ID_HEADER_KEY"] = args.sticky_header
    import ray
    from ray import serve

    local = {"_node_ip_address": "127.0.0.1", "include_dashboard": False} if args.address == "local" else {}
    ray.init(args.address, log_to_driver=False, logging_level=logging.WARNING, **local)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    try:
        serve.start(http_options={"host": args.host, "port": args.port}, logging_config={"log_level": "WARNING"})
        deploy(args, keys)
        counts = f"{args.replicas} to {args.most_replicas}" if args.most_replicas else args.replicas
        url = f"http://{args.host}:{args.port}"
        print(f"{model_of(args)[1]} listens on {url}, replicas: {counts}")
        print(example(url, bool(keys)), flush=True)
        signal.pause()
    except SystemExit:
        serve.delete(APP)  # waits for what is under way
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(args: argparse.Namespace, keys: dict[str, str]) -> None:
    """Returns once replicas answer."""
    from ray import serve

    deployment = serve.deployment(**deployment_options(args))(serve.ingress()(Replica))
    try:
        serve.run(deployment.bind(args, keys), name=APP)
    except RuntimeError:
        traceback = serve.status().applications[APP].deployments[DEPLOYMENT].message
        reason = traceback.splitlines()[-1].removeprefix("mimo_jax.errors.UserError: ")
        raise UserError(f"no replica starts: {reason}") from None


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
