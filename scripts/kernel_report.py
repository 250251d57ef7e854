"""What the expert kernels cost, without a GPU: compiled for an H200 that is not there, taken apart, counted.

scripts/kernel_report.py [--shapes pro-tp8 flash-tp8] [--tokens 1 8 16 256]

Needs the CUDA plugin and nvdisasm: `pip install --no-deps` what `pallas_kernels.topology.INSTALL` names, and
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import json

from mimo_jax.cli.guard import main_guard
from mimo_jax.errors import UserError
from pallas_kernels.expert_matmul import report
from pallas_kernels.expert_matmul.shapes import SHAPES

HEADER = "shape      tokens kernel   regs smem KB spills instr/weight  ALU/weight  max/mean  bytes"
LINE = (
    "{shape:10} {tokens:6} {kernel:8} {registers:4} {kilobytes:7.0f} {spill_bytes:6} {instructions:12.2f} {alu:11.2f} "
    "{max/mean:9.3f} {requested/needed:6.3f}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["pro-tp8", "flash-tp8"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 256])
    args = parser.parse_args()
    if problem := report.missing():
        raise UserError(f"kernel_report: {problem}")
    rows = []
    print(HEADER)
    for row in report.rows(args.shapes, args.tokens):
        rows.append(row)
        print(LINE.format(**row, kilobytes=row["shared_bytes"] / 1024))
    print(json.dumps(rows))


if __name__ == "__main__":
    main_guard(main)
