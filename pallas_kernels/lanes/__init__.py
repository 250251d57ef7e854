"""Code of one warpgroup, written once: emitted into a Mosaic kernel, or run by NumPy.

A tile is a function `tile(lanes, memories, scalars)`. `Lanes` offers the operations of one thread; what they return are
`Value`s, whose operators make code. `emitted.call` puts a tile into a kernel. `emulated.run` runs the same function on
all 128 threads at once, and checks bounds, alignment and races between threads: so the maps of operands are tested
where there is no GPU. What it cannot see is when other warpgroups write.
"""

from pallas_kernels.lanes.values import WARP, WARPGROUP, Lanes, Memory, Value

__all__ = ["WARP", "WARPGROUP", "Lanes", "Memory", "Value"]
