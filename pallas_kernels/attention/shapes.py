"""What one device holds of the global attention of the real models (their `config.json`), and one for a CPU."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Query heads and key heads on the device, width of a key, width of a value."""

    heads: int
    kv_heads: int
    key_width: int
    value_width: int

    @property
    def position_bytes(self) -> int:
        """A key and a value in bf16, of every key head."""
        return 2 * self.kv_heads * (self.key_width + self.value_width)


# MiMo-V2.5-Pro has 128 heads over 8; of MiMo-V2-Flash's (and MiMo-V2.5's) 64 over 4, four devices hold as many each.
PRO_TP8 = Shape(heads=16, kv_heads=1, key_width=192, value_width=128)
SMALL = Shape(heads=6, kv_heads=2, key_width=48, value_width=32)
SHAPES = {"pro-tp8": PRO_TP8, "small": SMALL}
