"""Products by FP8 weights on eight simulated devices: what every device computes of its own part adds up."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.modeling import fp8_linear as module
from mimo_jax.modeling.fp8_linear import fp8_linear, on_each_device
from mimo_jax.quantization import multiply_fp8, quantize_fp8
from mimo_jax.sharding import PARAMETERS, Layout, make_mesh, place, using
from pallas_kernels.devices import compiling_for

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; on CPU they are simulated")
SHAPES = {"qkv": (8, 200, 256), "q": (1024, 256), "gate": (1024, 256), "down": (200, 1024)}


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@eight
@pytest.mark.parametrize("layout", [Layout(tensor=8), Layout(data=2, expert=2, tensor=2)], ids=["TP8", "2x2x2"])
@pytest.mark.parametrize("name", SHAPES)
def test_parts_make_the_whole(name, layout):
    """Rows, chunks or columns cut over the devices, with the reference in the kernel's place: one device's numbers."""
    x = jnp.asarray(random((2, 3, SHAPES[name][-1]), 0))
    weight = jax.tree.map(jnp.asarray, quantize_fp8(random(SHAPES[name], 1)))
    expected = multiply_fp8(x, weight)
    mesh = make_mesh(layout)
    placed = place({name: {"codes": weight.codes, "scales": weight.scales}}, mesh)[name]

    @jax.jit
    def run(x, codes, scales):
        with using(mesh):
            return on_each_device(x, type(weight)(codes, scales), PARAMETERS[name], "reference")

    found = run(x, placed["codes"], placed["scales"])
    assert found.shape == expected.shape == (2, 3, *SHAPES[name][:-1])
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "shape", "is_served"),
    [
        ("qkv", (8, 200, 256), True),
        ("gate", (1024, 256), True),
        ("gate", (1000, 256), False),  # 125 rows each: a block would lie on two devices
        ("gate", (1024, 200), False),
        ("down", (200, 1024), True),
        ("down", (200, 512), False),
        ("o", (200, 1024), True),
    ],
)
@eight
def test_the_kernel_gets_whole_blocks(name, shape, is_served, monkeypatch):
    """A mesh that cuts through blocks, or a parameter whose axes are not given, is left to the compiler."""
    monkeypatch.setattr(module, "choose", lambda x, codes: "triton")
    monkeypatch.setattr(module, "on_each_device", lambda x, weight, axes, backend: backend)
    x, weight = jnp.ones((1, 40, shape[-1]), jnp.bfloat16), quantize_fp8(random(shape, 0))
    with using(make_mesh(Layout(tensor=8))):
        assert fp8_linear(x, weight, PARAMETERS[name]) == ("triton" if is_served else None)
        assert fp8_linear(x, weight, ()) is None
    assert fp8_linear(x, weight, ()) == ("triton" if shape[-1] % 128 == 0 else None)


def test_without_a_kernel_few_tokens_are_multiplied_as_codes():
    """On a CPU, or where Triton does not serve: block sums for few tokens, and nothing for many."""
    weight = quantize_fp8(random((200, 256), 0))
    for serving in (contextlib.nullcontext(), compiling_for(80)):
        with serving:
            assert fp8_linear(jnp.ones((1, 16, 256), jnp.bfloat16), weight, ()).shape == (1, 16, 200)
            assert fp8_linear(jnp.ones((1, 17, 256), jnp.bfloat16), weight, ()) is None
    assert fp8_linear(jnp.ones((1, 8, 256)), jnp.ones((200, 256)), ()) is None
