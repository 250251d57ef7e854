"""What one device holds of one layer of MiMo-V2.5-Pro at tensor parallel 8, and one shape small enough for a CPU."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Chunks with a scale grid each, rows of a chunk, columns."""

    chunks: int
    rows: int
    cols: int

    def nbytes(self, tokens: int) -> int:
        """Codes and scales, bf16 tokens and float32 products."""
        scales = 4 * self.chunks * -(-self.rows // 128) * (self.cols // 128)
        return self.chunks * self.rows * (self.cols + 4 * tokens) + scales + 2 * tokens * self.cols


QKV = Shape(chunks=1, rows=3392, cols=6144)  # 26.5 blocks of rows
GATE = Shape(chunks=1, rows=2048, cols=6144)  # of the dense MLP; up is the same
DOWN = Shape(chunks=1, rows=6144, cols=2048)
SMALL = Shape(chunks=2, rows=200, cols=1152)
SHAPES = {"qkv": QKV, "gate": GATE, "down": DOWN, "small": SMALL}
