"""One of several processes of a test: loads its part of a checkpoint, counts the bytes, generates, prints one line.

python tests/tools/two_processes.py CHECKPOINT ORBAX COORDINATOR COUNT INDEX
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import tensorstore

from mimo_jax import layouts
from mimo_jax.checkpoint.huggingface import open_checkpoint, probe_qkv, read_params
from mimo_jax.checkpoint.orbax import read_orbax
from mimo_jax.cli.distributed import HEARTBEAT_SECONDS, START_SECONDS
from mimo_jax.generation import generate
from mimo_jax.loading import Model
from mimo_jax.sharding import MeshShape, make_mesh, parameter_sharding


class Ids:
    """A tokenizer's stand-in."""

    def decode(self, ids: list[int], visible: object = ()) -> str:
        return " ".join(map(str, ids))


def main(checkpoint: str, orbax: str, coordinator: str, count: str, index: str) -> None:
    if int(count) > 1:
        jax.distributed.initialize(
            coordinator,
            int(count),
            int(index),
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    mesh = make_mesh(MeshShape(tensor=8))
    source = open_checkpoint(Path(checkpoint))
    read: list[int] = []
    params = read_params(source, lambda path, shape: parameter_sharding(path, shape, mesh), read.append)
    probed = probe_qkv(source, params)
    checksum = sum(
        int(np.asarray(shard.data).reshape(-1).view(np.uint8).astype(np.int64).sum())
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    )
    before = bytes_from_files()
    restored = read_orbax(orbax, lambda path, shape: parameter_sharding(path, shape, mesh)).params
    orbax_read = bytes_from_files() - before
    same = all(
        np.array_equal(np.asarray(one.data), np.asarray(other.data))
        for leaves in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True)
        for one, other in zip(*(leaf.addressable_shards for leaf in leaves), strict=True)
    )
    _, config, params = layouts.for_device(dataclasses.replace(source.config, dtype="float32"), params, mesh)
    model = Model(config, params, Ids(), mesh=mesh)
    tokens = generate(model, list(range(1, 20)), max_tokens=8).tokens
    found = {"read": sum(read), "probed": probed, "checksum": checksum, "tokens": tokens}
    print(json.dumps({**found, "orbax_same": same, "orbax_read": orbax_read}), flush=True)


def bytes_from_files() -> int:
    """What TensorStore, which reads for Orbax, has read from files so far."""
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


if __name__ == "__main__":
    main(*sys.argv[1:])
