"""What one device holds of one layer of the real models (their `config.json`), and one small enough for a CPU."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Experts on the device, hidden size, the device's features of each expert, experts per token."""

    experts: int
    hidden: int
    features: int
    chosen: int

    @property
    def expert_bytes(self) -> int:
        """Codes and scales of gate, up and down: 4.25 bits per weight."""
        return 3 * self.hidden * self.features * 17 // 32


# MiMo-V2.5-Pro has 384 experts of 2,048 features, MiMo-V2-Flash (and MiMo-V2.5) 256: an eighth of the features each.
PRO_TP8 = Shape(experts=384, hidden=6144, features=256, chosen=8)
FLASH_TP8 = Shape(experts=256, hidden=4096, features=256, chosen=8)
PRO_EP8 = Shape(experts=48, hidden=6144, features=2048, chosen=8)
SMALL = Shape(experts=6, hidden=512, features=256, chosen=2)
SHAPES = {"pro-tp8": PRO_TP8, "flash-tp8": FLASH_TP8, "pro-ep8": PRO_EP8, "small": SMALL}
