"""Random packed experts and the op's definition in float64, for the kernels' tests."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import mxfp4
from pallas_kernels.expert_matmul import PackedExperts

EXPERTS, HIDDEN, FEATURES, CHOSEN = 6, 512, 256, 2


def packed_experts(
    experts: int = EXPERTS, hidden: int = HIDDEN, features: int = FEATURES, seed: int = 0
) -> PackedExperts:
    """In numpy; outputs of scale 1 for tokens of scale 1."""
    rng = np.random.default_rng(seed)

    def stack(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
        codes, scales = mxfp4.quantize(rng.normal(0, cols**-0.5, (experts, rows, cols)).astype(np.float32))
        return mxfp4.pack(codes), scales

    return PackedExperts(stack(features, hidden), stack(features, hidden), stack(hidden, features))


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def tokens_of(count: int, seed: int = 1, hidden: int = HIDDEN, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, hidden)), dtype)


def weights_of(count: int, chosen: int = CHOSEN, seed: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(chosen), count), jnp.float32)


def routing(count: int, case: str, seed: int = 3, experts: int = EXPERTS, chosen: int = CHOSEN) -> np.ndarray:
    """Expert ids [count, chosen], int32, of a named kind of imbalance."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:chosen] for _ in range(count)]).astype(np.int32)
    if case == "one expert":
        ids[:, 0] = experts - 1
        ids[:, 1:] = np.stack([rng.permutation(experts - 1)[: chosen - 1] for _ in range(count)])
    elif case == "same few":
        ids[:] = ids[0]
    elif case == "some elsewhere":  # as on a device that holds other experts' neighbours
        ids[rng.random(ids.shape) < 0.5] = experts
        ids[0] = experts
    return ids


CASES = ("mixed", "one expert", "same few", "some elsewhere")


def definition(x: jax.Array, ids: np.ndarray, weights: jax.Array, experts: PackedExperts) -> np.ndarray:
    """In float64, but for the one rounding that the op states: hidden activations in the dtype of the tokens."""
    gate, up, down = (
        mxfp4.decode(mxfp4.unpack(codes), scales).astype(np.float64)
        for codes, scales in (experts.gate, experts.up, experts.down)
    )
    rounding = ml_dtypes.bfloat16 if x.dtype == jnp.bfloat16 else np.float64
    y = np.zeros(x.shape)
    for token, row in enumerate(np.asarray(x, np.float64)):
        for expert, weight in zip(ids[token], np.asarray(weights, np.float64)[token]):
            if expert < len(gate):
                before = gate[expert] @ row
                hidden = before / (1 + np.exp(-before)) * (up[expert] @ row)
                y[token] += weight * (down[expert] @ hidden.astype(rounding).astype(np.float64))
    return y


def relative_error(found, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))
