"""Runs the Triton kernels in Triton's interpreter and compares; a process of its own, for the switch is read at import.

TRITON_INTERPRET=1 python -m tests.kernels.expert_matmul.interpreted_triton
"""

import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels.expert_matmul import triton as backend
from pallas_kernels.expert_matmul import triton_kernels
from pallas_kernels.expert_matmul.reference import work_groups
from tests.kernels.expert_matmul.samples import (
    CHOSEN,
    EXPERTS,
    FEATURES,
    HIDDEN,
    definition,
    packed_experts,
    relative_error,
    routing,
    tokens_of,
    weights_of,
)


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def run(tokens: int, case: str, columns: int) -> float:
    packed = packed_experts()
    # In float32: the interpreter keeps bf16 as integers, and multiplies those.
    x, ids, weights = tokens_of(tokens, dtype=jnp.float32), routing(tokens, case), weights_of(tokens)
    expert_U, pair_Uc = work_groups(jnp.asarray(ids), EXPERTS, columns)
    tables = tensor(expert_U), tensor(pair_Uc)
    sizes = {"D": HIDDEN, "F": FEATURES, "PAIRS": columns, "ROWS": backend.ROWS, "COLS": backend.COLS}
    hidden = torch.full((ids.size, FEATURES), torch.nan)
    stacks = [[tensor(part) for part in stack] for stack in (packed.gate, packed.up, packed.down)]
    grid = (expert_U.size, FEATURES // backend.ROWS)
    triton_kernels.gate_up[grid](tensor(x), *stacks[0], *stacks[1], *tables, hidden, X=CHOSEN, **sizes)
    y = torch.full((ids.size, HIDDEN), torch.nan)
    triton_kernels.down[(expert_U.size, HIDDEN // backend.ROWS)](hidden, *stacks[2], *tables, y, **sizes)
    found = backend.combine(jnp.asarray(y.numpy()), jnp.asarray(ids) < EXPERTS, weights)
    return relative_error(found, definition(x, ids, weights, packed))


if __name__ == "__main__":
    for case in ("mixed", "some elsewhere"):
        error = run(5, case, backend.DECODE_COLUMNS)
        assert error < 1e-6, (case, error)  # float32 sums in another order
    error = run(40, "one expert", backend.PREFILL_COLUMNS)
    assert error < 1e-6, error
    print("agreed")
