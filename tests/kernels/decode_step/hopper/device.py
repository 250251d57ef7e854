"""Tiles and programs on the GPU itself, called as their emulation is: `emulated.run` and `threads.run`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_step.hopper import mosaic_gpu
from pallas_kernels.decode_step.hopper.plan import SHARED_BYTES
from pallas_kernels.decode_step.hopper.sync import given_up
from pallas_kernels.lanes import emitted
from pallas_kernels.lanes.values import F32, I32, WARPGROUP
from tests.kernels.decode_step.hopper.tile_tools import OPTIONS

RESERVED = 4096  # bytes of shared memory that are left for the compiler


class Done:
    """What of `emulated.Emulated` a test looks at."""

    conflicts = 0  # which the GPU does not tell

    def __init__(self, state: Sequence[np.ndarray]) -> None:
        self.state = list(state)


def run(
    tile: Callable[..., Any],
    arrays: Sequence[np.ndarray],
    scalars: Mapping[str, int] = {},
    lanes: Any = None,
    state: Sequence[np.ndarray | float] | None = None,
) -> Done:
    """See `emulated.run`. The smaller arrays lie in shared memory, as many as have room."""
    kernel = kernel_of(_Key(tile), tuple(array.size for array in arrays), tuple(scalars), len(state or ()))
    numbers = np.array([*scalars.values(), 0], np.int32)
    first = [np.broadcast_to(np.asarray(held, np.float32), WARPGROUP) for held in state or ()]
    held = np.concatenate([*first, np.zeros(1, np.float32)])
    *found, after = kernel(numbers, held, *(array.reshape(-1).view(np.int32) for array in arrays))
    for array, changed in zip(arrays, found):
        array.reshape(-1).view(np.int32)[:] = changed
    return Done(np.asarray(after)[:-1].reshape(-1, WARPGROUP))


class _Key:
    """A tile; equal to another one that was made by the same function of the same values."""

    def __init__(self, tile: Callable) -> None:
        self.tile, self.parts = tile, _parts_of(tile)

    def __hash__(self) -> int:
        return hash(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.parts == other.parts


def _parts_of(value: Any) -> Any:
    value = inspect.unwrap(value) if callable(value) else value  # of what checks annotations, anew for each function
    if hasattr(value, "__closure__"):
        return value.__code__, tuple(_parts_of(cell.cell_contents) for cell in value.__closure__ or ())
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


@cache
def kernel_of(key: _Key, sizes: tuple[int, ...], names: tuple[str, ...], states: int) -> Callable:
    """Takes scalars, the state, and all arrays; returns arrays and state."""
    places = _places(sizes)
    shared = [plgpu.SMEM((size,), jnp.int32) for size, is_shared in zip(sizes, places) if is_shared]

    def body(numbers: Any, state: Any, *refs: Any) -> None:
        given, found, after = refs[: len(sizes)], refs[len(sizes) : -1], refs[-1]

        def scoped(*scratch: Any) -> None:
            free = iter(scratch)
            used = [next(free) if is_shared else ref for is_shared, ref in zip(places, found)]
            scalars = {name: numbers[index] for index, name in enumerate(names)}
            call = partial(_around, key.tile, sizes, states)
            emitted.call(call, [*given, state, *used, *found, after], scalars)

        pl.run_scoped(scoped, *shared, collective_axes="warpgroup")

    outs = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes]
    outs.append(jax.ShapeDtypeStruct((states * WARPGROUP + 1,), jnp.float32))
    mesh = plgpu.Mesh(num_threads=1, thread_name="warpgroup")
    return jax.jit(pl.kernel(body, out_type=tuple(outs), mesh=mesh, compiler_params=OPTIONS))


def _places(sizes: Sequence[int]) -> list[bool]:
    """Whether each array is in shared memory."""
    left, places = SHARED_BYTES - RESERVED, [False] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index]):
        size = 4 * sizes[index] + 1024  # where it begins is a multiple of that
        places[index] = size <= left
        left -= size * places[index]
    return places


def _around(tile: Callable, sizes: Sequence[int], states: int, lanes: Any, memories: Any, scalars: Any) -> None:
    """Copies in, the tile, copies out."""
    count = len(sizes)
    given, state, used = memories[:count], memories[count], memories[count + 1 : 2 * count + 1]
    found, after = memories[2 * count + 1 : -1], memories[-1]
    for source, target, size in zip(given, used, sizes):
        _copy(lanes, source, target, size)
    lanes.barrier()
    held = [lanes.load_one(state, lanes.thread + number * WARPGROUP, F32) for number in range(states)]
    results = tile(lanes, used, scalars, held) if states else tile(lanes, used, scalars)
    for number in range(states):
        lanes.store([results[number]], after, lanes.thread + number * WARPGROUP)
    lanes.barrier()
    for source, target, size, is_shared in zip(used, found, sizes, _places(sizes)):
        if is_shared:
            _copy(lanes, source, target, size)


def _copy(lanes: Any, source: Any, target: Any, size: int) -> None:
    def one(index: Any) -> tuple:
        at = index * WARPGROUP + lanes.thread
        with lanes.when(at < size):
            lanes.store([lanes.load_one(source, at, I32)], target, at)
        return ()

    lanes.loop(0, -(-size // WARPGROUP), 1, one, [])


def launch(plan, table, step, tokens, weights, devices, seed=0, delay=0.0) -> None:
    """See `threads.run`, for one device."""
    (given,), (held,) = weights, devices
    numbers = np.asarray(step, np.int32)
    found = jitted(plan)(table, numbers, np.asarray(tokens, np.int32), on_gpu(given), held)
    assert (reason := given_up(found.fault)) is None, reason
    for array, changed in zip(jax.tree.leaves(held), jax.tree.leaves(found)):
        array[...] = changed


_PLACED: dict[int, Any] = {}


def on_gpu(weights: Any) -> Any:
    """Copied once for as long as the process lives."""
    if id(weights) not in _PLACED:
        _PLACED[id(weights)] = weights, jax.device_put(weights)
    return _PLACED[id(weights)][1]


_PROGRAMS: dict[str, Callable] = {}


def jitted(plan: Any) -> Callable:
    """The launch of a plan, compiled once."""
    name = repr(plan)  # whose formats have no hash
    if name not in _PROGRAMS:
        _PROGRAMS[name] = jax.jit(partial(mosaic_gpu.launch, plan), donate_argnums=4)
    return _PROGRAMS[name]
