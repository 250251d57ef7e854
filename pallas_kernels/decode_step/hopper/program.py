"""What every role of a CTA does for every row: the round of a decode step, in terms of tiles, copies and counters.

Where it runs is a `Machine`'s business: as a Pallas kernel (`mosaic_gpu`), or in NumPy with a thread for each role, as
tests do. Consumers are four warpgroups ("teams"). Each row ends with all of them together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pallas_kernels.decode_step.hopper.copies import Copies
from pallas_kernels.decode_step.hopper.cta import Turns
from pallas_kernels.decode_step.hopper.roles import Row
from pallas_kernels.decode_step.hopper.table import Op


class Program(Copies):
    """All rows: those of consumers here, in `dense_rows`, `expert_rows` and `attention_rows`; copies in `copies`."""

    def consume(self, team: Any) -> dict[tuple[int, ...], Callable[[Row, Any], Any]]:
        """Handlers of a team's rows, each of which begins with `await_row` and ends with `signal_row`."""
        shared: dict[Any, list[Op]] = {}
        for op, handler in self.handlers().items():
            shared.setdefault(handler, []).append(op)
        return {tuple(ops): partial(handler, team) for handler, ops in shared.items()}

    def handlers(self) -> dict[Op, Callable[[Any, Row, Turns], Turns]]:
        has = {layer.has_experts for layer in self.plan.target.layers}
        found: dict[Op, Callable[[Any, Row, Turns], Turns]] = {Op.EMBED: self.embed, Op.REDUCE: self.reduce}
        found |= {Op.QKV: self.widen, Op.OUTPUT: self.output, Op.HEAD: self.head}
        found |= {Op.PICK: self.pick, Op.PICK_BEST: self.pick_best}
        if False in self.plan.kinds:
            found |= {Op.ATTEND: self.attend, Op.MERGE: self.merge}
        if True in self.plan.kinds:
            found |= {Op.ATTEND_WINDOW: self.attend_window}
        if False in has:
            found |= {Op.GATE_UP: self.widen, Op.DOWN: self.down}
        if True in has:
            found |= {Op.ROUTER: self.router, Op.TOP_K: self.top_k}
            found |= {Op.EXPERT_GATE_UP: self.expert_gate_up, Op.EXPERT_DOWN: self.expert_down}
        return found
