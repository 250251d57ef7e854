"""What the expert kernels cost, without a GPU: compiled for an H200 that is not there, taken apart, counted.

scripts/kernel_report.py [--shapes pro-tp8 flash-tp8] [--tokens 1 8 16 256]

Needs the CUDA plugin and nvdisasm: `pip install --no-deps` what `pallas_kernels.topology.INSTALL` names, and
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import json
import sys

from mimo_jax.cli.guard import main_guard
from mimo_jax.cli.options import Parser
from mimo_jax.cli.values import whole
from mimo_jax.errors import UserError

HEADER = "shape      tokens kernel   regs smem KB spills instr/weight  ALU/weight  max/mean  bytes"
LINE = (
    "{shape:10} {tokens:6} {kernel:8} {registers:4} {kilobytes:7.0f} {spill_bytes:6} {instructions:12.2f} {alu:11.2f} "
    "{max/mean:9.3f} {requested/needed:6.3f}"
)


def parser() -> Parser:
    from pallas_kernels.expert_matmul.shapes import SHAPES

    parser = Parser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["pro-tp8", "flash-tp8"])
    parser.add_argument("--tokens", nargs="+", type=whole(1), default=[1, 8, 16, 256])
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    from pallas_kernels.expert_matmul import report

    if problem := report.missing():
        raise UserError(f"kernel_report: {problem}")
    rows = []
    print(HEADER)
    for row in report.rows(args.shapes, args.tokens):
        rows.append(row)
        print(LINE.format(**row, kilobytes=row["shared_bytes"] / 1024))
    print(json.dumps(rows))


if __name__ == "__main__":
    main_guard(lambda: main(sys.argv[1:]))
