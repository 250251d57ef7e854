"""One contract for every backend: the definition's numbers, a scale grid for each chunk; bad input is named."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.fp8_matmul import BACKENDS, choose, fp8_matmul
from tests.kernels.fp8_matmul.samples import definition, relative_error, tokens_of, weights_of

CODES, SCALES = map(jnp.asarray, weights_of(2, 200, 256))
run = jax.jit(fp8_matmul, static_argnames="backend")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(1, 384, 256), (2, 200, 384), (1, 5, 128)])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_the_op_is_its_definition(tokens, shape, dtype):
    """Any number of tokens, whole and short blocks of rows: what float64 gives, to float32's rounding of the sums."""
    codes, scales = weights_of(*shape)
    x = tokens_of(tokens, shape[-1], dtype)
    found = run(x, jnp.asarray(codes), jnp.asarray(scales))
    assert found.dtype == jnp.float32
    assert relative_error(found, definition(x, codes, scales)) < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes_JOI": CODES[0]}, r"codes of shape \(200, 256\)"),
        ({"codes_JOI": CODES[..., :200]}, r"codes of shape \(2, 200, 200\)"),
        ({"codes_JOI": CODES.astype(jnp.float8_e5m2)}, "codes of dtype float8_e5m2"),
        ({"x_TI": jnp.zeros((2, 128), jnp.bfloat16)}, r"tokens of shape \(2, 128\); the weights read rows of 256"),
        ({"x_TI": jnp.zeros((2, 256), jnp.int32)}, "tokens of dtype int32"),
        ({"scales_Joi": SCALES[:, :1]}, r"scales float32 \(2, 1, 2\); float32 \(2, 2, 2\)"),
        ({"scales_Joi": SCALES.astype(jnp.bfloat16)}, "scales bfloat16"),
        ({"backend": "cutlass"}, "'cutlass' is unknown; known: triton, reference"),
    ],
)
def test_bad_input_is_named(changes, message, unchecked):
    """Arguments that do not fit are an error that holds the value, before anything is compiled."""
    arguments = {"x_TI": tokens_of(2, 256), "codes_JOI": CODES, "scales_Joi": SCALES, **changes}
    with pytest.raises(ValueError, match=message):
        fp8_matmul(**arguments)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"reference"}))
def test_a_named_backend_never_gives_way(backend):
    """On a CPU the GPU's backend says what it needs, and which one can serve the call."""
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU is here")
    assert choose(tokens_of(2, 256), CODES) == "reference"
    with pytest.raises(NotImplementedError, match=rf"'{backend}' cannot serve this call: .*cpu.*; reference can"):
        fp8_matmul(tokens_of(2, 256), CODES, SCALES, backend=backend)
