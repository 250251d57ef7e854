"""The same command as many processes: they find each other, and when one dies, all end with a message."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading

from mimo_jax.errors import UserError

START_SECONDS = 120  # for all processes to find each other
HEARTBEAT_SECONDS = 20  # of silence, after which a process counts as dead
_FAREWELL = b"done"
_connections: list[socket.socket] = []  # to process 0, or of process 0 to the others


def join(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Finds the other processes: at `coordinator`, or what Slurm, MPI or Kubernetes say if all three are None."""
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
    if _connections:
        _stop(str(error).splitlines()[0][:200])


def _stop(reason: str) -> None:
    import jax

    print(f"error: another process has stopped, so process {jax.process_index()} stops too ({reason})", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)  # an orderly exit would wait for the dead
