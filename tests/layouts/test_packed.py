"""Products by FP8 weights on eight simulated devices: what every device computes of its own part adds up."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax import layouts
from mimo_jax.layouts import packed
from mimo_jax.layouts.packed import PackedMatrix
from mimo_jax.sharding import MeshShape, make_mesh, parameter_axes, place, using
from mimo_jax.weights import dequantize, quantize_fp8
from pallas_kernels.devices import compiling_for
from tests.tiny import random_params, tiny_config

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; on CPU they are simulated")
SHAPES = {
    "attention/qkv": (8, 200, 256),
    "attention/q": (1024, 256),
    "mlp/gate": (1024, 256),
    "mlp/down": (200, 1024),
}


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matrix_of(path: str, shape: tuple[int, ...]) -> PackedMatrix:
    """Random FP8 weights of the parameter at `path`."""
    weights = jax.tree.map(jnp.asarray, quantize_fp8(random(shape, 1)))
    return PackedMatrix(weights, parameter_axes(path.split("/")))


@eight
@pytest.mark.parametrize("shape", [MeshShape(tensor=8), MeshShape(data=2, expert=2, tensor=2)], ids=["TP8", "2x2x2"])
@pytest.mark.parametrize("path", SHAPES)
def test_parts_make_the_whole(path, shape):
    """Rows, chunks or columns split over the devices, with the reference in the kernel's place: the whole product."""
    x = jnp.asarray(random((2, 3, SHAPES[path][-1]), 0))
    matrix, mesh = matrix_of(path, SHAPES[path]), make_mesh(shape)
    expected = matrix.multiply_on_each_device(x, "reference")
    exact = np.einsum("bti,...i->bt...", x, np.asarray(dequantize(matrix.tensor)))
    np.testing.assert_allclose(expected, exact, atol=2e-5 * np.abs(exact).max())

    @jax.jit
    def run(x, matrix):
        with using(mesh):
            return matrix.multiply_on_each_device(x, "reference")

    found = run(x, place(matrix, mesh))
    assert found.shape == expected.shape == (2, 3, *SHAPES[path][:-1])
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("path", "shape", "is_served"),
    [
        ("attention/qkv", (8, 200, 256), True),
        ("mlp/gate", (1024, 256), True),
        ("mlp/gate", (1000, 256), False),  # 125 rows each: a block would lie on two devices
        ("mlp/gate", (1024, 200), False),
        ("mlp/down", (200, 1024), True),
        ("mlp/down", (200, 512), False),
        ("attention/o", (200, 1024), True),
    ],
)
@eight
def test_the_kernel_gets_whole_blocks(path, shape, is_served, monkeypatch):
    """A mesh that splits blocks is left to the compiler."""
    served = []
    monkeypatch.setattr(packed, "choose", lambda x, codes: "triton")
    monkeypatch.setattr(PackedMatrix, "multiply_on_each_device", lambda *call: served.append(call))
    x, matrix = jnp.ones((1, 40, shape[-1]), jnp.bfloat16), matrix_of(path, shape)
    with using(make_mesh(MeshShape(tensor=8))):
        matrix.multiply(x)
    assert len(served) == is_served
    matrix.multiply(x)
    assert len(served) == is_served + (shape[-1] % 128 == 0)


def test_without_a_kernel_few_tokens_are_multiplied_as_codes(monkeypatch):
    """On a CPU, or where Triton does not serve: block sums for few tokens, expanded weights for many."""
    expanded = []
    multiply = packed.multiply_plain
    monkeypatch.setattr(packed, "multiply_plain", lambda x, weight: expanded.append(x) or multiply(x, weight))
    matrix = matrix_of("mlp/gate", (200, 256))
    for serving in (contextlib.nullcontext(), compiling_for(80)):
        with serving:
            assert matrix.multiply(jnp.ones((1, 16, 256), jnp.bfloat16)).shape == (1, 16, 200)
            assert not expanded
            assert matrix.multiply(jnp.ones((1, 17, 256), jnp.bfloat16)).shape == (1, 17, 200)
            assert expanded.pop().shape == (1, 17, 256)


@eight
def test_plain_arrays_are_shared_by_a_mesh_too():
    """`layout="dense"` on a mesh: each device holds its part of what the mesh splits, not all of it."""
    config = tiny_config()
    mesh = make_mesh(MeshShape(tensor=2))
    _, _, params = layouts.for_device(config, random_params(config), mesh, "dense")
    embed = params["embed"]
    assert embed.addressable_shards[0].data.shape == (config.vocab_size // 2, config.hidden_size)
    assert len(embed.sharding.device_set) == 2
