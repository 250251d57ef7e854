"""One contract for every backend: the definition's numbers, rows that are not read; bad input is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import BACKENDS, attend_long, reference, triton
from pallas_kernels.devices import compiling_for
from tests.kernels.attention.samples import definition, error, inputs


@pytest.mark.parametrize("capacity", [24, 29])
@pytest.mark.parametrize("with_sink", [False, True])
def test_the_reference_is_the_definition(capacity, with_sink, monkeypatch):
    """In chunks, a ragged last one too: what each query sees, within float32; chunks after the last are not read."""
    monkeypatch.setattr(reference, "CHUNK", 8)
    run = jax.jit(lambda *arrays: attend_long(*arrays, backend="reference"))
    for lengths in ([3, 8], [10, 16], [19, 12], [24, 23]):
        q, k, v, query, sink = inputs((2, 2, 2), lengths, 3, capacity)
        sink = sink if with_sink else None
        expected = definition(q, k, v, query, sink)
        # Rows of a chunk that is read must be numbers; the ragged last one starts among those before it.
        read = -(-max(lengths) // 8) * 8
        for array in (k, v):
            array[:, :, :read] = np.nan_to_num(array[:, :, :read])
            array[:, :, read:] = 0 if read + 8 > capacity else np.nan
        assert error(run(q, k, v, query, sink), expected) < 2e-6


def test_positions_past_the_capacity_see_every_row():
    """As the padding of a last chunk of a prompt does."""
    q, k, v, _, sink = inputs((1, 1, 2), [16], 2, 16)
    found = attend_long(*map(jnp.asarray, (q, k, v)), jnp.array([[15, 99]]), jnp.asarray(sink))
    assert error(found, definition(q, k, v, np.array([[15, 15]]), sink)) < 2e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_BTHQ": jnp.zeros((2, 4, 48))}, r"queries \(2, 4, 48\), .* four axes"),
        ({"q_BTHQ": jnp.zeros((2, 3, 4, 47))}, r"queries \(2, 3, 4, 47\), .* do not fit"),
        ({"v_BKSV": jnp.zeros((2, 2, 15, 32))}, r"values \(2, 2, 15, 32\) do not fit"),
        ({"v_BKSV": jnp.zeros((2, 2, 16, 0))}, r"values \(2, 2, 16, 0\); none may be empty"),
        ({"q_BTHQ": jnp.zeros((2, 3, 5, 48))}, "5 query heads over 2 key heads"),
        ({"k_BKSQ": jnp.zeros((2, 2, 16, 48), jnp.int8)}, "keys of dtype int8"),
        ({"query_BT": jnp.zeros((2, 3))}, r"positions \(2, 3\) of dtype float32"),
        ({"query_BT": jnp.zeros((3, 3), jnp.int32)}, r"positions \(3, 3\)"),
        ({"sink_H": jnp.zeros(3)}, r"sinks \(3,\) for 4 query heads"),
        ({"backend": "cudnn"}, "'cudnn' is unknown; known: triton, reference"),
    ],
)
def test_bad_input_is_named(changes, message, unchecked):
    """Arguments that do not fit are an error that holds the value, before anything is compiled."""
    names = ("q_BTHQ", "k_BKSQ", "v_BKSV", "query_BT", "sink_H")
    arguments = dict(zip(names, map(jnp.asarray, inputs((2, 2, 2), [9, 16], 3, 16)))) | changes
    with pytest.raises(ValueError, match=message):
        attend_long(**arguments)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"reference"}))
def test_a_named_backend_never_gives_way(backend):
    """On a CPU the GPU's backends say what they need, and which backend can serve the call."""
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU is here")
    arrays = map(jnp.asarray, inputs((1, 1, 2), [9], 3, 16))
    with pytest.raises(NotImplementedError, match=rf"'{backend}' cannot serve this call: .*cpu.*; reference can"):
        attend_long(*arrays, backend=backend)


@pytest.mark.parametrize(
    ("widths", "dtype", "message"),
    [
        ((192, 128), jnp.bfloat16, None),
        ((128, 128), jnp.bfloat16, None),
        ((24, 128), jnp.bfloat16, "keys of width 24"),
        ((176, 128), jnp.bfloat16, "keys of width 176, not the sum"),
        ((256, 128), jnp.bfloat16, "keys of width 256 and values of width 128, of at most 192 and 128"),
        ((1, 128), jnp.bfloat16, "keys of width 1,"),
        ((192, 96), jnp.bfloat16, "values of width 96"),
        ((192, 128), jnp.float32, "queries of dtype float32"),
    ],
)
def test_triton_says_what_it_cannot_serve(widths, dtype, message, monkeypatch):
    """Only widths that its products can be split into, and only bfloat16."""
    monkeypatch.setattr(triton.triton_call, "missing", lambda: None)
    q = jax.ShapeDtypeStruct((1, 8, 16, widths[0]), dtype)
    k, v = (jax.ShapeDtypeStruct((1, 1, 1 << 20, width), dtype) for width in widths)
    reason = triton.unsupported(q, k, v)
    assert reason is None if message is None else message in reason


def test_a_gpu_gets_the_reference_where_triton_cannot_serve():
    """By default nothing is refused: float32 is multiplied by XLA, also on a GPU."""
    arrays = [jnp.asarray(x) for x in inputs((1, 1, 2), [9], 3, 16)]
    with compiling_for(90):
        assert attend_long(*arrays).dtype == jnp.float32
