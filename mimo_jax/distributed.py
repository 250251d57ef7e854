"""The same command on several devices or machines: its mesh, and `jax.distributed` where it runs as many processes."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

from mimo_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

START_SECONDS = 120  # for all processes to find each other
HEARTBEAT_SECONDS = 20  # of silence, after which a process counts as dead
_FAREWELL = b"done"
_connections: list[socket.socket] = []  # to process 0, or of process 0 to the others


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """The options that `mesh_of` reads."""
    group = parser.add_argument_group("devices and machines")
    group.add_argument("--data-parallel", type=int, default=1, help="copies of the model, which share the batch")
    group.add_argument("--expert-parallel", type=int, default=1, help="groups that experts are dealt out over")
    group.add_argument(
        "--tensor-parallel", type=int, default=1, help="devices that share every matrix; the whole is the product"
    )
    group.add_argument("--distributed", action="store_true", help="find the processes of Slurm, MPI or Kubernetes")
    group.add_argument("--coordinator", help="host:port of process 0, where nothing can be found")
    group.add_argument("--num-processes", type=int)
    group.add_argument("--process-id", type=int)


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """Joins the other processes, if there are any, and makes the mesh; None for one device."""
    by_hand = (args.coordinator, args.num_processes, args.process_id)
    if any(value is not None for value in by_hand) and None in by_hand:
        raise UserError("distributed: --coordinator, --num-processes and --process-id belong together")
    from mimo_jax.sharding import Layout, make_mesh

    layout = Layout(args.data_parallel, args.expert_parallel, args.tensor_parallel)
    if args.distributed or args.coordinator:
        _join(*by_hand)
    return make_mesh(layout) if layout.devices > 1 else None


def _join(coordinator: str | None, count: int | None, index: int | None) -> None:
    import jax

    if index is not None and not 0 <= index < (count or 0):
        raise UserError(f"distributed: --process-id {index} must lie in 0..{(count or 0) - 1}")
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"distributed: the processes did not find each other ({str(error).splitlines()[0]})") from None
    _watch_each_other(coordinator.rpartition(":")[0] if coordinator else socket.gethostname())
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # one voice


def _watch_each_other(host: str) -> None:
    """Process 0 keeps a connection to every other one; whoever goes without a word takes all with it, at once.

    JAX by itself notices only after HEARTBEAT_SECONDS, and then aborts with a stack trace.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    is_first = jax.process_index() == 0
    server = socket.create_server(("", 0)) if is_first else None
    port = int(multihost_utils.broadcast_one_to_all(np.int32(server.getsockname()[1] if server else 0)))
    if server:
        _connections.extend(server.accept()[0] for _ in range(jax.process_count() - 1))
    else:
        _connections.append(socket.create_connection((host, port), timeout=START_SECONDS))
        _connections[0].settimeout(None)
    for connection in _connections:
        threading.Thread(target=_listen, args=(connection,), daemon=True).start()


def _listen(connection: socket.socket) -> None:
    try:
        last_words = connection.recv(len(_FAREWELL))
    except OSError:
        last_words = b""
    if last_words != _FAREWELL:
        _stop("its connection is closed")


def leave() -> None:
    """Says that this process has done its work; without that, its end is the end of all."""
    for connection in _connections:
        with contextlib.suppress(OSError):
            connection.sendall(_FAREWELL)


def stop_if_another_died(error: Exception) -> None:
    """Ends this process with one line if it is one of several: a collective fails where another has gone."""
    import jax

    if jax.process_count() > 1:
        _stop(str(error).splitlines()[0][:200])


def _stop(reason: str) -> None:
    import jax

    print(f"error: another process has stopped, so process {jax.process_index()} stops too ({reason})", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)  # an orderly exit would wait for the dead
